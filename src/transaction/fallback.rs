//! What begin does when the lock service cannot be reached.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;

use crate::error::{Error, Result};

/// The choice of a coordinator or of a single transaction.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Fallback {
    /// An error: [`Unavailable`](crate::ErrorKind::Unavailable).
    #[default]
    Fail,
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

    /// Decides about an outage: `Ok` when the work has been taken care of.
    pub(super) async fn decide(&self, keys: Vec<String>, cause: Error) -> Result<()> {
        match self {
            Fallback::Fail => Err(cause),
            Fallback::Handler(Handler(handler)) => handler(Outage { keys, cause }).await,
        }
    }
}

impl fmt::Debug for Handler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handler")
    }
}
