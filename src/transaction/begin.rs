//! Asking for a transaction.

use std::sync::Arc;
use std::time::Duration;

use tracing::Instrument;

use crate::error::{Error, ErrorKind, Result};
use crate::protocol::Backoff;
use crate::store::Store;
use crate::types::{FencingToken, Lease, LeaseState, MAX_WAIT, Mode, OwnerId, Want};

use super::core::{Core, Terms, Transaction};
use super::{Fallback, Shared};

/// A transaction to be begun.
#[derive(Clone, Debug)]
#[must_use = "nothing is locked until the transaction is begun or run"]
pub struct TransactionRequest {
    pub(super) shared: Arc<Shared>,
    pub(super) exclusive: Vec<String>,
    pub(super) shared_keys: Vec<String>,
    stores: Vec<String>,
    lease: Duration,
    wait: Duration,
    pub(super) retry: Backoff,
    fallback: Fallback,
    pub(super) owner: Option<OwnerId>,
    pub(super) floor: Option<FencingToken>,
}

impl TransactionRequest {
    pub(super) fn new<K: AsRef<str>>(
        shared: Arc<Shared>,
        keys: impl IntoIterator<Item = K>,
    ) -> Self {
        let (lease, wait, retry) = (shared.lease, shared.wait, shared.retry);
        let fallback = shared.fallback.clone();
        Self {
            shared,
            exclusive: texts(keys),
            shared_keys: Vec::new(),
            stores: Vec::new(),
            lease,
            wait,
            retry,
            fallback,
            owner: None,
            floor: None,
        }
    }

    /// Adds keys that are only read, and may be read by others at the same time.
    pub fn shared<K: AsRef<str>>(mut self, keys: impl IntoIterator<Item = K>) -> Self {
        self.shared_keys.extend(texts(keys));
        self
    }

    /// The stores in which branches are opened at begin, fenced in one order. Stores that are not
    /// named here are fenced when they are enlisted.
    pub fn stores<'a, S: Store>(mut self, stores: impl IntoIterator<Item = &'a S>) -> Self {
        self.stores.extend(stores.into_iter().map(|store| store.name().to_owned()));
        self
    }

    /// How long the locks are leased for: 10 ms to 24 h. They are renewed while the transaction
    /// lives.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// How long begin waits for keys that others hold; zero tries once. Each fence waits as long
    /// for a connection and for rows that others have changed, and at least a second.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// How [`TransactionRequest::run`] waits between attempts, and when it gives up.
    pub fn retry(mut self, retry: Backoff) -> Self {
        self.retry = retry;
        self
    }

    /// What begin does when the lock service cannot be reached.
    pub fn fallback(mut self, fallback: Fallback) -> Self {
        self.fallback = fallback;
        self
    }

    /// Re-enters as this owner, who holds locks already. Such a transaction is never started over,
    /// because what the owner holds elsewhere would stay behind.
    pub fn owner(mut self, owner: OwnerId) -> Self {
        self.owner = Some(owner);
        self
    }

    /// Tokens must exceed `floor`, as [`Error::floor`] of a stale token named it.
    pub fn floor(mut self, floor: FencingToken) -> Self {
        self.floor = self.floor.max(Some(floor));
        self
    }

    /// Takes all locks, and opens the branches of the stores that were named.
    ///
    /// # Errors
    /// Those of [`LockRequest::acquire`](crate::LockRequest::acquire) and of
    /// [`Tx::enlist`](crate::Tx::enlist). When the lock service is
    /// [`Unavailable`](ErrorKind::Unavailable), the fallback decides.
    ///
    /// # Cancel safety
    /// Dropping the future gives up in the background whatever was locked or opened.
    pub async fn begin(self) -> Result<Transaction> {
        let span = tracing::debug_span!("palisade.begin", keys = self.exclusive.len());
        self.attempt(Arc::default()).instrument(span).await
    }

    pub(super) async fn attempt(&self, state: Arc<LeaseState>) -> Result<Transaction> {
        if let Some(name) = &self.shared.ambiguous {
            let detail = format!("two stores are called {name:?}; give each a name of its own");
            return Err(Error::new(ErrorKind::Misuse, "begin", detail));
        }
        let locks = &self.shared.locks;
        let owner = self.owner.unwrap_or_else(|| locks.owner());
        let wait = self.wait.min(MAX_WAIT);
        // It is the wait that ends an attempt to lock, not the patience with whole attempts.
        let retry = Backoff { max_elapsed: wait, ..self.retry };
        let terms = Terms { lease: Lease::new(self.lease)?, wait, retry, floor: self.floor };
        let request = locks
            .lock_all(&self.exclusive)
            .shared(&self.shared_keys)
            .ttl(self.lease)
            .wait(wait)
            .retry(retry)
            .floor(self.floor)
            .state(Arc::clone(&state));
        let request = match self.owner {
            Some(owner) => request.owner(owner),
            None => request.new_owner(owner),
        };
        let guard = match request.acquire().await {
            Ok(guard) => Some(guard),
            Err(cause) if cause.is_unavailable() => {
                tracing::warn!(%cause, "begin without the lock service");
                self.fallback.decide(self.keys(), cause).await?;
                None
            }
            Err(error) => return Err(error),
        };
        let core = Core::new(Arc::clone(&self.shared), owner, terms, guard, state)?;
        let transaction = Transaction::new(core);
        if !transaction.is_degraded() {
            self.open_stores(&transaction).await?;
        }
        Ok(transaction)
    }

    async fn open_stores(&self, transaction: &Transaction) -> Result<()> {
        let mut names = self.stores.clone();
        names.sort_unstable();
        names.dedup();
        let read_only = self.exclusive.is_empty();
        for name in names {
            transaction.core.open(&name, read_only).await?;
        }
        Ok(())
    }

    fn keys(&self) -> Vec<String> {
        let mut keys: Vec<String> =
            self.exclusive.iter().chain(&self.shared_keys).cloned().collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// Names further keys, as an error advised.
    pub(super) fn declare(&mut self, wants: Vec<Want>) {
        for want in wants {
            let key = String::from(want.key);
            match want.mode {
                Mode::Shared => self.shared_keys.push(key),
                Mode::Exclusive => self.exclusive.push(key),
            }
        }
    }
}

fn texts<K: AsRef<str>>(keys: impl IntoIterator<Item = K>) -> Vec<String> {
    keys.into_iter().map(|key| key.as_ref().to_owned()).collect()
}
