//! What begin does when the lock service cannot be reached.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::lock::Locks;
use crate::types::FencingToken;

/// The choice of a coordinator or of a single transaction.
///
/// It decides about begin alone: a transaction that began under locks ends by the rules of its
/// lease, and one that began without them stays without them. The next begin asks the lock service
/// first again. [`Tx::is_degraded`](crate::Tx::is_degraded) says how a transaction began.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Fallback {
    /// An error: [`Unavailable`](crate::ErrorKind::Unavailable).
    #[default]
    Fail,
    /// The fence rows in the stores are the locks.
    ///
    /// Begin takes the rows of all keys in every store that the transaction has declared
    /// ([`TransactionRequest::stores`](crate::TransactionRequest::stores)), and keeps them until
    /// the end. The store issues the token, above every token that the rows have seen. That is as
    /// safe as a transaction under locks, also beside others that still reach the lock service:
    /// whoever of them comes later with a lower token is stale and starts over, and whoever has the
    /// rows already is waited for.
    ///
    /// What differs: a key is waited for in the order of the database and no longer in line, with a
    /// connection of the pool in hand; a shared key keeps others out as an exclusive one does; and
    /// a process that stops keeps its keys until the store ends its session, a lease later. A
    /// transaction that declared no store fails with [`Degraded`](crate::ErrorKind::Degraded).
    StoreFence,
    /// Another lock service; see [`Fallback::backend`].
    Backend(Locks),
    /// A function of the program decides, or does the work instead.
    Handler(Handler),
}

type Answer = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// See [`Fallback::handler`].
#[derive(Clone)]
pub struct Handler(Arc<dyn Fn(Outage) -> Answer + Send + Sync>);

/// Why a transaction could not take its locks.
#[derive(Debug)]
#[non_exhaustive]
pub struct Outage {
    /// The keys that the transaction named, sorted.
    pub keys: Vec<String>,
    /// What the lock service answered, or that it did not.
    pub cause: Error,
}

impl Fallback {
    /// Takes the locks from another lock service while the first cannot be reached.
    ///
    /// Tokens keep rising through both switches, so that what is left of transactions before a
    /// switch is stale after it, in the stores. Nothing but the stores knows of both services:
    /// while some processes reach the first and others do not, both may grant one key at once, and
    /// the one with the lower token starts over.
    ///
    /// ```
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use palisade::{Coordinator, Fallback};
    ///
    /// let locks = palisade::connect("memory:").await?;
    /// let spare = palisade::connect("memory:").await?;
    /// let coordinator = Coordinator::builder(locks).fallback(Fallback::backend(spare)).build();
    /// # let _ = coordinator;
    /// # Ok::<(), palisade::Error>(())
    /// # }).unwrap();
    /// ```
    #[must_use]
    pub fn backend(locks: Locks) -> Self {
        Self::Backend(locks)
    }

    /// Asks `handler` when the lock service cannot be reached.
    ///
    /// `Ok(())` means that the handler has taken the work on itself, for example by writing it to a
    /// queue: begin then returns a transaction for which
    /// [`is_degraded`](crate::Tx::is_degraded) holds. It has no locks and no tokens, so it opens no
    /// branch, and its commit does nothing. `Err` refuses: begin returns that error.
    ///
    /// ```
    /// use palisade::{Error, ErrorKind, Fallback};
    ///
    /// let fallback = Fallback::handler(async |outage| {
    ///     if outage.keys.iter().all(|key| key.starts_with("mail:")) {
    ///         return Ok(()); // written to an outbox, to be sent later
    ///     }
    ///     let refusal = Error::new(ErrorKind::Unavailable, "begin", "only mail can wait");
    ///     Err(refusal.with_source(outage.cause))
    /// });
    /// # let _ = fallback;
    /// ```
    pub fn handler<F, Fut>(handler: F) -> Self
    where
        F: Fn(Outage) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        Self::Handler(Handler(Arc::new(move |outage| Box::pin(handler(outage)))))
    }
}

impl Handler {
    /// Decides about an outage: `Ok` when the work has been taken care of.
    pub(super) async fn decide(&self, outage: Outage) -> Result<()> {
        (self.0)(outage).await
    }
}

impl fmt::Debug for Handler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handler")
    }
}

/// Who grants a transaction its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ground {
    /// The lock service.
    Locks,
    /// The lock service of the fallback.
    OtherLocks,
    /// The fence rows in the stores.
    Rows,
    /// Nobody: a handler has taken the work on itself.
    Nothing,
}

/// What a coordinator remembers of the switches between its lock service and the fallback.
#[derive(Debug, Default)]
pub(super) struct Switch {
    away: AtomicBool,
    /// The highest token that the lock service has granted,
    locks: AtomicU64,
    /// and the highest that the fallback has.
    fallback: AtomicU64,
}

impl Switch {
    /// What a token of `ground` has to exceed. Nothing unless the switch to it has only just been
    /// made: a floor has its price.
    pub(super) fn floor(&self, ground: Ground) -> Option<FencingToken> {
        let (own, other) = match ground {
            Ground::Locks => (&self.locks, &self.fallback),
            _ => (&self.fallback, &self.locks),
        };
        let other = other.load(Ordering::Relaxed);
        let behind = other > own.load(Ordering::Relaxed);
        behind.then(|| FencingToken::new(other)).flatten()
    }

    /// Forgets a floor that `ground` cannot exceed, because somebody has made a number up.
    ///
    /// What is forgotten is only advice: whatever the store has seen, it refuses a lower token.
    pub(super) fn forget(&self, ground: Ground, floor: FencingToken) {
        let other = match ground {
            Ground::Locks => &self.fallback,
            _ => &self.locks,
        };
        let _ = other.compare_exchange(floor.get(), 0, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Notes what a transaction on `ground` was granted, and tells of a switch.
    pub(super) fn granted(&self, ground: Ground, token: FencingToken) {
        match ground {
            Ground::Locks => {
                self.locks.fetch_max(token.get(), Ordering::Relaxed);
                if self.away.load(Ordering::Relaxed) && self.away.swap(false, Ordering::Relaxed) {
                    tracing::info!("the lock service is back: transactions take its locks again");
                }
            }
            _ => {
                self.fallback.fetch_max(token.get(), Ordering::Relaxed);
            }
        }
    }

    /// The lock service cannot be reached, so the fallback decides.
    pub(super) fn fall_back(&self, cause: &Error) {
        if self.away.swap(true, Ordering::Relaxed) {
            tracing::debug!(%cause, "begin without the lock service");
        } else {
            tracing::warn!(%cause, "the lock service cannot be reached: the fallback decides");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_floor_is_named_once_per_switch() {
        let (switch, token) = (Switch::default(), |number| FencingToken::new(number).unwrap());
        assert_eq!((switch.floor(Ground::Locks), switch.floor(Ground::OtherLocks)), (None, None));
        switch.granted(Ground::Locks, token(10));
        assert_eq!(switch.floor(Ground::Locks), None);
        assert_eq!(switch.floor(Ground::OtherLocks), Some(token(10)));
        switch.granted(Ground::OtherLocks, token(11));
        assert_eq!(switch.floor(Ground::OtherLocks), None);
        assert_eq!(switch.floor(Ground::Locks), Some(token(11)));
        switch.granted(Ground::Locks, token(12));
        assert_eq!(switch.floor(Ground::Locks), None);
    }

    #[test]
    fn a_floor_that_cannot_be_exceeded_is_forgotten() {
        let (switch, token) = (Switch::default(), |number| FencingToken::new(number).unwrap());
        switch.granted(Ground::Rows, token(1 << 52));
        switch.forget(Ground::Locks, token(7));
        assert_eq!(switch.floor(Ground::Locks), Some(token(1 << 52)), "another one");
        switch.forget(Ground::Locks, token(1 << 52));
        assert_eq!(switch.floor(Ground::Locks), None);
    }
}
