//! Running work in a transaction, and starting over where that is safe.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Error, RetryAdvice};

use super::TransactionRequest;
use super::core::{Transaction, Tx};

impl TransactionRequest {
    /// Begins, runs `work`, and commits. When `work` fails, the transaction is rolled back.
    ///
    /// The whole is started over when an attempt failed for a reason that another attempt may not
    /// meet: keys were busy, a statement or the commit lost against another transaction (SQLSTATE
    /// 40001, 40P01, 55P03, `SQLITE_BUSY`), the lease was lost before the commit, the token was
    /// stale (then as a new owner with a higher token), or waiting for more keys could have
    /// deadlocked (then with all keys declared). The failure is seen where it happens, whatever
    /// error `work` makes of it: that of a statement, of `enlist`, or of `nested`, unless one of
    /// the latter two has succeeded since. It is never started over after
    /// [`InDoubt`](crate::ErrorKind::InDoubt), nor for an error that is `work`'s own.
    ///
    /// `work` also runs when the fallback has taken care of an outage; it asks
    /// [`Tx::is_degraded`](crate::Tx::is_degraded).
    ///
    /// When the lease is lost, the future of `work` is dropped where it stands.
    ///
    /// # Errors
    /// The error of `work`, or that of begin or commit, after the last attempt.
    ///
    /// # Cancel safety
    /// Dropping the future drops `work` and rolls back in the background; a commit that has begun
    /// goes on.
    pub async fn run<T, E, F, Fut>(self, work: F) -> Result<T, E>
    where
        E: From<Error>,
        F: Fn(Tx) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let mut request = self;
        let started = Instant::now();
        let mut attempt = 0;
        loop {
            let (error, advice) = match request.run_once(&work).await {
                Ok(value) => return Ok(value),
                Err(failed) => failed,
            };
            let Some(pause) = request.heed(advice, attempt, started.elapsed()) else {
                return Err(error);
            };
            tracing::debug!(attempt, ?pause, "the transaction is started over");
            tokio::time::sleep(pause).await;
            attempt += 1;
        }
    }

    async fn run_once<T, E, F, Fut>(&self, work: &F) -> Result<T, (E, RetryAdvice)>
    where
        E: From<Error>,
        F: Fn(Tx) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let advised = |error: Error| {
            let advice = error.retry_advice();
            (E::from(error), advice)
        };
        let transaction = self.attempt().await.map_err(advised)?;
        let state = Arc::clone(&transaction.core.state);
        let answer = tokio::select! {
            biased;
            () = state.lost().cancelled() => None,
            answer = work(transaction.tx()) => Some(answer),
        };
        match answer {
            Some(Ok(value)) => {
                let core = Arc::clone(&transaction.core);
                transaction.commit().await.map(|()| value).map_err(|error| {
                    let advice =
                        if error.is_in_doubt() { RetryAdvice::Never } else { core.advice() };
                    (E::from(error), advice)
                })
            }
            Some(Err(error)) => {
                let advice = transaction.core.advice();
                match in_doubt(transaction).await {
                    Some(doubt) => Err((E::from(doubt), RetryAdvice::Never)),
                    None => Err((error, advice)),
                }
            }
            None => {
                let error = transaction.core.lost("run");
                let advice = transaction.core.advice();
                match in_doubt(transaction).await {
                    Some(doubt) => Err((E::from(doubt), RetryAdvice::Never)),
                    None => Err((E::from(error), advice)),
                }
            }
        }
    }

    /// Prepares the next attempt, and says how long to wait for it; `None` if there is to be none.
    fn heed(&mut self, advice: RetryAdvice, attempt: u32, elapsed: Duration) -> Option<Duration> {
        let is_own = self.owner.is_none();
        match advice {
            RetryAdvice::Never => return None,
            RetryAdvice::Again if is_own => {}
            RetryAdvice::Above(token) if is_own => self.floor = self.floor.max(Some(token)),
            RetryAdvice::Declare(wants) if is_own => self.declare(wants),
            // Locks that the owner holds outside of this transaction would stay behind.
            RetryAdvice::Again | RetryAdvice::Above(_) | RetryAdvice::Declare(_) => return None,
        }
        self.retry.delay(attempt, fastrand::f64(), elapsed)
    }
}

/// Rolls back. The error, if it is not sure that nothing was committed: the work has sent a COMMIT
/// of its own. Any other failure leaves nothing, because the connection is closed.
async fn in_doubt(transaction: Transaction) -> Option<Error> {
    let answer = transaction.rollback().await;
    if let Err(error) = &answer {
        tracing::debug!(%error, "rollback before the next attempt");
    }
    answer.err().filter(Error::is_in_doubt)
}
