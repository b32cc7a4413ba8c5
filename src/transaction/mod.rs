//! Transactions: locks, begin, work behind the fence, commit or rollback.

mod begin;
mod core;
mod fallback;
mod finish;
mod health;
mod keeper;
mod nested;
mod observe;
mod run;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;

use crate::error::Error;
use crate::lock::{Locks, Statistics};
use crate::protocol::Backoff;
use crate::store::Store;

use fallback::Switch;
use keeper::Keeper;

pub use begin::TransactionRequest;
pub use core::{Transaction, Tx};
pub use fallback::{Fallback, Handler, Outage};
pub use health::Health;
pub use nested::Nested;

/// Begins transactions over one lock service and the stores it was built with. Clones share
/// everything.
#[derive(Clone, Debug)]
pub struct Coordinator {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    locks: Locks,
    stores: BTreeMap<String, Arc<dyn Store>>,
    /// A name under which two stores were given.
    ambiguous: Option<String>,
    lease: Duration,
    wait: Duration,
    retry: Backoff,
    fallback: Fallback,
    switch: Switch,
    keeper: Arc<Keeper>,
    tasks: TaskTracker,
    runtime: Handle,
}

/// Builds a [`Coordinator`].
#[derive(Debug)]
#[must_use]
pub struct CoordinatorBuilder {
    locks: Locks,
    stores: BTreeMap<String, Arc<dyn Store>>,
    ambiguous: Option<String>,
    lease: Duration,
    wait: Duration,
    retry: Backoff,
    fallback: Fallback,
}

impl Coordinator {
    /// Starts to build a coordinator over `locks`; lease and wait are those of the lock service
    /// until set otherwise.
    pub fn builder(locks: Locks) -> CoordinatorBuilder {
        let options = locks.options();
        CoordinatorBuilder {
            locks,
            stores: BTreeMap::new(),
            ambiguous: None,
            lease: options.lease,
            wait: options.wait,
            retry: options.retry,
            fallback: Fallback::default(),
        }
    }

    /// Prepares a transaction that holds all of `keys` exclusively.
    pub fn transaction<K: AsRef<str>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> TransactionRequest {
        TransactionRequest::new(Arc::clone(&self.shared), keys)
    }

    /// Runs `work` in a transaction over `keys`, commits it, and starts over where that is safe.
    ///
    /// This is [`TransactionRequest::run`] with the settings of the coordinator.
    ///
    /// # Errors
    /// As [`TransactionRequest::run`].
    ///
    /// # Cancel safety
    /// As [`TransactionRequest::run`].
    pub async fn run<K, T, E, F, Fut>(
        &self,
        keys: impl IntoIterator<Item = K>,
        work: F,
    ) -> Result<T, E>
    where
        K: AsRef<str>,
        E: From<Error>,
        F: Fn(Tx) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        self.transaction(keys).run(work).await
    }

    /// The lock service.
    #[must_use]
    pub fn locks(&self) -> &Locks {
        &self.shared.locks
    }

    /// What the lock service has done so far.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.shared.locks.statistics()
    }

    /// Waits until everything that was left to the background is done: commits whose caller went
    /// away, rollbacks of dropped transactions.
    ///
    /// # Cancel safety
    /// Dropping the future has no effect.
    pub async fn settled(&self) {
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
        self.shared.tasks.reopen();
    }
}

impl CoordinatorBuilder {
    /// Adds a store that transactions may enlist.
    pub fn store<S: Store + Clone>(mut self, store: &S) -> Self {
        let name = store.name().to_owned();
        if self.stores.insert(name.clone(), Arc::new(store.clone())).is_some() {
            self.ambiguous = Some(name);
        }
        self
    }

    /// How long locks are leased for; the watchdog renews them while the transaction lives.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// How long begin waits for keys that others hold, and each fence for rows that others have
    /// changed.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// How [`Coordinator::run`] waits between attempts, and when it gives up.
    pub fn retry(mut self, retry: Backoff) -> Self {
        self.retry = retry;
        self
    }

    /// What begin does when the lock service cannot be reached.
    pub fn fallback(mut self, fallback: Fallback) -> Self {
        self.fallback = fallback;
        self
    }

    /// The coordinator.
    ///
    /// # Panics
    /// Outside of a tokio runtime: what is left of dropped transactions is cleared up there.
    #[must_use]
    pub fn build(self) -> Coordinator {
        let Self { locks, stores, ambiguous, lease, wait, retry, fallback } = self;
        let (keeper, tasks, runtime) =
            (Arc::new(Keeper::default()), TaskTracker::new(), Handle::current());
        runtime.spawn(Arc::clone(&keeper).run());
        let shared = Shared {
            locks,
            stores,
            ambiguous,
            lease,
            wait,
            retry,
            fallback,
            switch: Switch::default(),
            keeper,
            tasks,
            runtime,
        };
        Coordinator { shared: Arc::new(shared) }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.keeper.stop();
    }
}
