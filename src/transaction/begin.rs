//! Asking for a transaction.

use std::sync::Arc;
use std::time::Duration;

use tracing::Instrument;

use crate::error::{Error, ErrorKind, Result};
use crate::lock::Locks;
use crate::protocol::Backoff;
use crate::store::Store;
use crate::types::{FencingToken, Lease, LeaseState, MAX_WAIT, Mode, OwnerId, ResourceKey, Want};

use super::core::{Core, Grant, Terms, Transaction};
use super::fallback::Ground;
use super::{Fallback, Outage, Shared, observe};

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
    /// named here are fenced when they are enlisted. They are where the locks are when the lock
    /// service is away and the fallback is [`Fallback::StoreFence`].
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
        self.attempt().instrument(span).await
    }

    pub(super) async fn attempt(&self) -> Result<Transaction> {
        if let Some(name) = &self.shared.ambiguous {
            let detail = format!("two stores are called {name:?}; give each a name of its own");
            return Err(Error::new(ErrorKind::Misuse, "begin", detail));
        }
        let wait = self.wait.min(MAX_WAIT);
        // It is the wait that ends an attempt to lock, not the patience with whole attempts.
        let retry = Backoff { max_elapsed: wait, ..self.retry };
        let terms = Terms { lease: Lease::new(self.lease)?, wait, retry, floor: self.floor };
        let grant = match self.ask(Ground::Locks, &self.shared.locks, terms).await {
            Err(cause) if cause.is_unavailable() => self.fall_back(cause, terms).await?,
            answer => answer?,
        };
        let core = Core::new(Arc::clone(&self.shared), terms, grant)?;
        let transaction = Transaction::new(core);
        if transaction.core.ground != Ground::Nothing {
            self.open_stores(&transaction).await?;
        }
        Ok(transaction)
    }

    /// Takes the locks of a lock service, above what the other one has granted if that can be.
    async fn ask(&self, ground: Ground, locks: &Locks, terms: Terms) -> Result<Grant> {
        let switch = &self.shared.switch;
        let advised = switch.floor(ground).filter(|floor| Some(*floor) > terms.floor);
        let above = Terms { floor: advised.or(terms.floor), ..terms };
        match (self.ask_above(ground, locks, above).await, advised) {
            (Err(error), Some(floor)) if error.kind() == ErrorKind::Corrupt => {
                tracing::warn!(%error, "the floor of the other lock service is left aside");
                switch.forget(ground, floor);
                self.ask_above(ground, locks, terms).await
            }
            (answer, _) => answer,
        }
    }

    async fn ask_above(&self, ground: Ground, locks: &Locks, terms: Terms) -> Result<Grant> {
        let owner = self.owner.unwrap_or_else(|| locks.owner());
        let state = Arc::<LeaseState>::default();
        let request = locks
            .lock_all(&self.exclusive)
            .shared(&self.shared_keys)
            .ttl(self.lease)
            .wait(terms.wait)
            .retry(terms.retry)
            .floor(terms.floor)
            .state(Arc::clone(&state));
        let request = match self.owner {
            Some(owner) => request.owner(owner),
            None => request.new_owner(owner),
        };
        let guard = request.acquire().await?;
        self.shared.switch.granted(ground, guard.token());
        Ok(Grant { ground, locks: locks.clone(), owner, state, guard: Some(guard) })
    }

    /// Does as the fallback says.
    async fn fall_back(&self, cause: Error, terms: Terms) -> Result<Grant> {
        self.shared.switch.fall_back(&cause);
        let locks = &self.shared.locks;
        let without = |ground| Grant {
            ground,
            locks: locks.clone(),
            owner: self.owner.unwrap_or_else(|| locks.owner()),
            state: Arc::default(),
            guard: None,
        };
        let grant = match &self.fallback {
            Fallback::Fail => return Err(cause),
            Fallback::StoreFence if self.stores.is_empty() => {
                let detail = "without the lock service the fence rows are the locks, and the \
                              transaction has declared no store to have them in; name its stores";
                return Err(Error::new(ErrorKind::Degraded, "begin", detail).with_source(cause));
            }
            Fallback::StoreFence => without(Ground::Rows),
            Fallback::Backend(locks) => self.ask(Ground::OtherLocks, locks, terms).await?,
            Fallback::Handler(handler) => {
                handler.decide(Outage { keys: self.keys(), cause }).await?;
                without(Ground::Nothing)
            }
        };
        observe::degraded(grant.ground);
        Ok(grant)
    }

    async fn open_stores(&self, transaction: &Transaction) -> Result<()> {
        let core = &transaction.core;
        if core.ground == Ground::Rows {
            core.want(self.wants()?);
        }
        let mut names = self.stores.clone();
        names.sort_unstable();
        names.dedup();
        let read_only = self.exclusive.is_empty();
        for name in names {
            core.open(&name, read_only).await?;
        }
        Ok(())
    }

    /// All keys, sorted, each once in its strongest mode.
    fn wants(&self) -> Result<Vec<Want>> {
        let want = |mode| move |key: &String| Ok(Want::new(ResourceKey::parse(key)?, mode));
        let exclusive = self.exclusive.iter().map(want(Mode::Exclusive));
        let shared = self.shared_keys.iter().map(want(Mode::Shared));
        let mut wants = exclusive.chain(shared).collect::<Result<Vec<_>>>()?;
        wants.sort_by(|a, b| (&a.key, b.mode).cmp(&(&b.key, a.mode)));
        wants.dedup_by(|b, a| a.key == b.key);
        Ok(wants)
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
