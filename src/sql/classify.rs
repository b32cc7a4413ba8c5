//! What an error of sqlx means: who has to act, and whether it helps to start over.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::io;

use crate::error::{Error, ErrorKind};

/// Makes our error of one of sqlx's, which stays its source. An error of ours that travelled
/// through sqlx comes out as it was.
pub(crate) fn classify(operation: &'static str, error: sqlx::Error) -> Error {
    match unwrap_own(error) {
        Ok(own) => own,
        Err(error) => {
            let kind = kind_of(&error);
            Error::new(kind, operation, detail(kind, &error)).with_source(error)
        }
    }
}

/// Every `?` on an sqlx call in a function that returns [`palisade::Result`](crate::Result) comes
/// through here.
impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        classify("statement", error)
    }
}

/// Sends an error of ours through an interface that only knows sqlx's.
pub(crate) fn refuse(error: Error) -> sqlx::Error {
    sqlx::Error::Io(io::Error::other(error))
}

/// Takes out what [`refuse`] put in.
pub(crate) fn unwrap_own(error: sqlx::Error) -> Result<Error, sqlx::Error> {
    match error {
        sqlx::Error::Io(io) if io.get_ref().is_some_and(|inner| inner.is::<Error>()) => {
            match io.into_inner().map(|inner| inner.downcast::<Error>()) {
                Some(Ok(own)) => Ok(*own),
                _ => Err(sqlx::Error::WorkerCrashed),
            }
        }
        error => Err(error),
    }
}

/// The kind of an error.
pub(crate) fn kind_of(error: &sqlx::Error) -> ErrorKind {
    match error {
        sqlx::Error::Io(io) => io
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<Error>())
            .map_or(ErrorKind::Unavailable, Error::kind),
        sqlx::Error::Tls(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => ErrorKind::Unavailable,
        sqlx::Error::Configuration(_) => ErrorKind::InvalidInput,
        sqlx::Error::Database(database) => {
            let code = database.code().unwrap_or(Cow::Borrowed(""));
            let ours = database.message().contains("palisade_");
            // SQLSTATEs have five characters; SQLite's codes are numbers of at most four digits.
            if code.len() == 5 {
                kind_of_sqlstate(&code, ours)
            } else {
                kind_of_sqlite(code.parse().unwrap_or(0), ours)
            }
        }
        _ => ErrorKind::Store,
    }
}

/// Whether an error was found on this side of the connection and left the transaction as it was.
pub(crate) fn is_benign(error: &sqlx::Error) -> bool {
    matches!(
        error,
        sqlx::Error::RowNotFound
            | sqlx::Error::InvalidArgument(_)
            | sqlx::Error::TypeNotFound { .. }
            | sqlx::Error::ColumnIndexOutOfBounds { .. }
            | sqlx::Error::ColumnNotFound(_)
            | sqlx::Error::ColumnDecode { .. }
            | sqlx::Error::Encode(_)
            | sqlx::Error::Decode(_)
    )
}

/// Whether the connection is gone, so that nobody knows what became of what was sent last.
pub(crate) fn lost_reply(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(io) => !io.get_ref().is_some_and(|inner| inner.is::<Error>()),
        sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(database) => {
            let code = database.code().unwrap_or(Cow::Borrowed(""));
            code.len() == 5
                && (code.starts_with("08") || code.starts_with("57P") || code == "25P03")
        }
        _ => false,
    }
}

/// The code that the server gave.
#[cfg(feature = "postgres")]
pub(crate) fn sqlstate(error: &sqlx::Error) -> Cow<'_, str> {
    error.as_database_error().and_then(|error| error.code()).unwrap_or(Cow::Borrowed(""))
}

fn kind_of_sqlstate(code: &str, ours: bool) -> ErrorKind {
    match code {
        // 57P01: a newer holder of a key has ended the session, or an operator has. 25P03: it was
        // idle for a lease, because this process was stopped. Whatever it had open is rolled back,
        // so it may start over; a server that is down says so then.
        "40001" | "40P01" | "55P03" | "57P01" | "25P03" => ErrorKind::Conflict,
        "25P02" => ErrorKind::Aborted,
        "42501" => ErrorKind::Denied,
        "42P01" | "42703" if ours => ErrorKind::NotMigrated,
        "53300" => ErrorKind::Unavailable,
        _ if code.starts_with("28") => ErrorKind::Denied,
        _ if code.starts_with("08") || code.starts_with("57P") => ErrorKind::Unavailable,
        _ => ErrorKind::Store,
    }
}

/// By the primary code, which is the lowest byte of an extended one.
fn kind_of_sqlite(code: u32, ours: bool) -> ErrorKind {
    match code & 0xff {
        5 | 6 => ErrorKind::Conflict,
        3 | 8 | 23 => ErrorKind::Denied,
        14 => ErrorKind::Unavailable,
        1 if ours => ErrorKind::NotMigrated,
        _ => ErrorKind::Store,
    }
}

fn detail(kind: ErrorKind, error: &sqlx::Error) -> &'static str {
    match (kind, error) {
        (_, sqlx::Error::PoolTimedOut) => {
            "the pool had no free connection in time; raise max_connections, or hold fewer branches"
        }
        (_, sqlx::Error::PoolClosed) => "the pool was closed",
        (ErrorKind::Conflict, error) if lost_reply(error) => {
            "the session was ended: by a newer holder of a key, by an operator, or because this \
             process was stopped for longer than its lease"
        }
        (ErrorKind::Conflict, _) => "the store could not order this transaction among others",
        (ErrorKind::Unavailable, _) => "the store could not be reached, or ended the session",
        (ErrorKind::Denied, _) => "the store refused the credentials, or a privilege is missing",
        (ErrorKind::NotMigrated, _) => "the tables of palisade are missing; call store.migrate()",
        (ErrorKind::Aborted, _) => {
            "an earlier statement failed; the transaction can only roll back"
        }
        _ => "the store reported an error",
    }
}

/// What is kept of a statement's failure, whose own error went to whoever sent the statement.
#[derive(Clone, Debug)]
pub(crate) struct Failed {
    kind: ErrorKind,
    text: Cow<'static, str>,
    fatal: bool,
}

impl Failed {
    /// Notes a failure before its error is passed on.
    pub(crate) fn of(error: &sqlx::Error) -> Self {
        let text = Cow::Owned(error.to_string());
        Self { kind: kind_of(error), text, fatal: lost_reply(error) }
    }

    /// A statement whose future was dropped before it had completed.
    pub(crate) fn cancelled() -> Self {
        let text = Cow::Borrowed("a statement was cancelled before it had completed");
        Self { kind: ErrorKind::Aborted, text, fatal: false }
    }

    /// Whether the session is gone, so that going back to a savepoint does not help.
    pub(crate) fn is_fatal(&self) -> bool {
        self.fatal
    }

    /// The failure, with the kind that the statement's own error had.
    pub(crate) fn error(&self) -> Error {
        let detail = "a statement of this branch failed; the transaction can only roll back";
        Error::new(self.kind, "statement", detail).with_source(self.clone())
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl StdError for Failed {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_ours_comes_back_out_of_sqlx_as_it_was() {
        let lost = Error::new(ErrorKind::LeaseLost, "statement", "the lease was lost");
        let error = Error::from(refuse(lost));
        assert_eq!(error.kind(), ErrorKind::LeaseLost);
        assert!(error.to_string().ends_with("the lease was lost"), "{error}");
        assert!(!lost_reply(&refuse(error)));
    }

    #[test]
    fn codes_are_sorted_by_who_has_to_act() {
        for code in ["40001", "40P01", "55P03", "25P03"] {
            assert_eq!(kind_of_sqlstate(code, false), ErrorKind::Conflict, "{code}");
        }
        assert_eq!(kind_of_sqlstate("28P01", false), ErrorKind::Denied);
        assert_eq!(kind_of_sqlstate("57P01", false), ErrorKind::Conflict);
        assert_eq!(kind_of_sqlstate("57P03", false), ErrorKind::Unavailable);
        assert_eq!(kind_of_sqlstate("42P01", false), ErrorKind::Store);
        assert_eq!(kind_of_sqlstate("42P01", true), ErrorKind::NotMigrated);
        assert_eq!(kind_of_sqlstate("23505", true), ErrorKind::Store);
        // SQLITE_BUSY_SNAPSHOT and SQLITE_LOCKED_SHAREDCACHE
        assert_eq!(kind_of_sqlite(517, false), ErrorKind::Conflict);
        assert_eq!(kind_of_sqlite(262, false), ErrorKind::Conflict);
        assert_eq!(kind_of_sqlite(1, true), ErrorKind::NotMigrated);
    }

    #[test]
    fn a_closed_pool_is_said_to_be_closed_and_keeps_its_source() {
        let error = Error::from(sqlx::Error::PoolClosed);
        assert!(error.is_unavailable());
        assert!(error.to_string().contains("closed"), "{error}");
        assert!(error.source().is_some());
    }
}
