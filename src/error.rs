//! The one error type, and what to do about each kind.
//!
//! An [`Error`] says what was attempted, on which key or store, what went wrong and what helps.
//! Code that must react asks [`Error::kind`], a predicate, or [`Error::retry_advice`]; text is for
//! people.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use uuid::Uuid;

use crate::types::{FencingToken, InvalidKey, InvalidLease, ResourceKey, Want};

/// The result of an operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, by who has to act.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The caller passed a value that can never work: a bad key, no keys, a lease out of range.
    InvalidInput,
    /// The caller used the API in an order or a combination that cannot work.
    Misuse,
    /// Another owner holds a key, or waits for it, and the caller did not want to wait.
    Busy,
    /// The caller waited for a key until its deadline.
    TimedOut,
    /// Waiting could deadlock, so it was refused; declare the keys of
    /// [`Error::declare`] together at the start.
    WouldDeadlock,
    /// The owner has entered a key as often as its limit allows.
    LimitReached,
    /// The lease ran out or was taken away: the lock service lost its memory, or this process was
    /// stopped for too long.
    LeaseLost,
    /// A store has already seen a newer holder of a key.
    StaleToken,
    /// The lock service or the store could not be reached, or did not answer in time.
    Unavailable,
    /// The server refused the credentials, one side does not accept the certificate of the other,
    /// or a privilege is missing.
    Denied,
    /// A foreign value stands where one of ours should be. It was left as it is.
    Corrupt,
    /// The store could not order this transaction among others: serialization failure, deadlock,
    /// lock time-out, database busy.
    Conflict,
    /// The store reported any other error.
    Store,
    /// The tables of palisade are missing in the store, or are of another version.
    NotMigrated,
    /// A statement of the branch failed or was cancelled; the transaction can only roll back.
    Aborted,
    /// Whether the transaction was committed is not known, and palisade does not guess.
    InDoubt,
    /// The transaction runs without the lock service and this is not possible then.
    Degraded,
    /// The lock service of this process was shut down.
    Closed,
}

/// What a caller may do about an error.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RetryAdvice {
    /// Trying again would fail again, or might do the work twice.
    Never,
    /// Start over, after a pause.
    Again,
    /// Start over with tokens above this one.
    Above(FencingToken),
    /// Start over, and declare these keys from the start.
    Declare(Vec<Want>),
}

/// The error of every operation of this crate.
///
/// ```
/// use palisade::{Error, ErrorKind, ResourceKey};
///
/// let error = Error::from(ResourceKey::parse("").unwrap_err());
/// assert_eq!(error.kind(), ErrorKind::InvalidInput);
/// assert!(!error.is_in_doubt());
/// ```
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    operation: &'static str,
    detail: String,
    key: Option<ResourceKey>,
    floor: Option<FencingToken>,
    declare: Vec<Want>,
    transaction: Option<Uuid>,
    is_final: bool,
    retry_after: Option<Duration>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of `kind` in `operation`; `detail` says what happened and what helps.
    #[must_use]
    pub fn new(kind: ErrorKind, operation: &'static str, detail: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            operation,
            detail: detail.into(),
            key: None,
            floor: None,
            declare: Vec::new(),
            transaction: None,
            is_final: false,
            retry_after: None,
            source: None,
        }))
    }

    /// Names the key that the error is about.
    #[must_use]
    pub fn with_key(mut self, key: ResourceKey) -> Self {
        self.0.key = Some(key);
        self
    }

    /// Names the token that a new attempt has to exceed.
    #[must_use]
    pub fn with_floor(mut self, floor: FencingToken) -> Self {
        self.0.floor = Some(floor);
        self
    }

    /// Names the keys that a new attempt has to declare from the start.
    #[must_use]
    pub fn with_declare(mut self, wants: Vec<Want>) -> Self {
        self.0.declare = wants;
        self
    }

    /// Names the transaction attempt that the error is about.
    #[must_use]
    pub fn with_transaction(mut self, id: Uuid) -> Self {
        self.0.transaction = Some(id);
        self
    }

    /// Says that the work may have been done, so that it must not be started over, whatever the
    /// kind.
    #[must_use]
    pub fn with_no_retry(mut self) -> Self {
        self.0.is_final = true;
        self
    }

    /// Says when it makes sense to try again.
    #[must_use]
    pub fn with_retry_after(mut self, wait: Duration) -> Self {
        self.0.retry_after = Some(wait);
        self
    }

    /// Adds the error behind this one.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// A copy that says the same. The errors behind it become text.
    pub(crate) fn to_keep(&self) -> Self {
        let Inner { kind, operation, detail, key, .. } = &*self.0;
        let copy = Self::new(*kind, operation, detail.as_str());
        let copy = key.iter().cloned().fold(copy, Self::with_key);
        let behind = std::iter::successors(self.source(), |&error| error.source());
        let texts: Vec<String> = behind.map(ToString::to_string).collect();
        if texts.is_empty() { copy } else { copy.with_source(texts.join(": ")) }
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was attempted, such as `acquire` or `commit`.
    #[must_use]
    pub fn operation(&self) -> &'static str {
        self.0.operation
    }

    /// The key that the error is about, if it is about one.
    #[must_use]
    pub fn key(&self) -> Option<&ResourceKey> {
        self.0.key.as_ref()
    }

    /// The token that a new attempt has to exceed, as the store reported it.
    #[must_use]
    pub fn floor(&self) -> Option<FencingToken> {
        self.0.floor
    }

    /// The keys that a new attempt has to declare from the start.
    #[must_use]
    pub fn declare(&self) -> &[Want] {
        &self.0.declare
    }

    /// The transaction attempt that the error is about.
    #[must_use]
    pub fn transaction(&self) -> Option<Uuid> {
        self.0.transaction
    }

    /// In how long the service is asked again whether it is back, where it was not asked this time
    /// because it had failed before.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// Whether the outcome of the transaction is unknown.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        self.kind() == ErrorKind::InDoubt
    }

    /// Whether somebody else has the keys now: [`ErrorKind::Busy`] or [`ErrorKind::TimedOut`].
    #[must_use]
    pub fn is_contended(&self) -> bool {
        matches!(self.kind(), ErrorKind::Busy | ErrorKind::TimedOut)
    }

    /// Whether the server could not be reached or did not answer.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        self.kind() == ErrorKind::Unavailable
    }

    /// Whether the caller no longer is who it was: the lease was lost or the token is stale.
    #[must_use]
    pub fn is_fenced_out(&self) -> bool {
        matches!(self.kind(), ErrorKind::LeaseLost | ErrorKind::StaleToken)
    }

    /// Whether the whole work may be started over, and how.
    ///
    /// An error in doubt is never retried: the work may have been done. Nor is a lease that was
    /// lost under a plain lock, where no store has kept the work of a stale holder out.
    #[must_use]
    pub fn retry_advice(&self) -> RetryAdvice {
        if self.0.is_final {
            return RetryAdvice::Never;
        }
        match self.kind() {
            ErrorKind::Busy | ErrorKind::LeaseLost | ErrorKind::Conflict => RetryAdvice::Again,
            ErrorKind::StaleToken => self.floor().map_or(RetryAdvice::Again, RetryAdvice::Above),
            ErrorKind::WouldDeadlock if !self.declare().is_empty() => {
                RetryAdvice::Declare(self.declare().to_vec())
            }
            ErrorKind::InvalidInput
            | ErrorKind::Misuse
            | ErrorKind::TimedOut
            | ErrorKind::WouldDeadlock
            | ErrorKind::LimitReached
            | ErrorKind::Unavailable
            | ErrorKind::Denied
            | ErrorKind::Corrupt
            | ErrorKind::Store
            | ErrorKind::NotMigrated
            | ErrorKind::Aborted
            | ErrorKind::InDoubt
            | ErrorKind::Degraded
            | ErrorKind::Closed => RetryAdvice::Never,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { operation, detail, key, .. } = &*self.0;
        match key {
            Some(key) => write!(f, "{operation} {key:?}: {detail}"),
            None => write!(f, "{operation}: {detail}"),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Error");
        out.field("kind", &self.0.kind).field("message", &format_args!("{self}"));
        if let Some(floor) = self.0.floor {
            out.field("floor", &floor);
        }
        if !self.0.declare.is_empty() {
            out.field("declare", &self.0.declare);
        }
        if let Some(id) = self.0.transaction {
            out.field("transaction", &id);
        }
        if let Some(source) = &self.0.source {
            out.field("source", source);
        }
        out.finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.0.source {
            Some(source) => Some(&**source),
            None => None,
        }
    }
}

impl From<InvalidKey> for Error {
    fn from(invalid: InvalidKey) -> Self {
        Self::new(ErrorKind::InvalidInput, "parse key", invalid.to_string())
    }
}

impl From<InvalidLease> for Error {
    fn from(invalid: InvalidLease) -> Self {
        Self::new(ErrorKind::InvalidInput, "parse lease", invalid.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_operation_and_key_and_never_repeats_the_source() {
        let error = Error::new(ErrorKind::Busy, "acquire", "held by another owner")
            .with_key(ResourceKey::parse("order:7").unwrap())
            .with_source("socket closed");
        assert_eq!(error.to_string(), "acquire \"order:7\": held by another owner");
        assert_eq!(error.source().unwrap().to_string(), "socket closed");
    }

    #[test]
    fn nothing_in_doubt_is_ever_retried() {
        let error = Error::new(ErrorKind::InDoubt, "commit", "the reply was lost");
        assert_eq!(error.retry_advice(), RetryAdvice::Never);
    }
}
