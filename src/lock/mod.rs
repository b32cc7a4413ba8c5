//! Locks on their own: acquire, hold, renew, release.
//!
//! ```
//! # tokio_test(async {
//! let locks = palisade::connect("memory:").await?;
//!
//! let guard = locks.lock("report:2026").acquire().await?;
//! println!("token {}", guard.token());
//! guard.release().await?;
//! # Ok::<(), palisade::Error>(())
//! # });
//! # fn tokio_test(f: impl Future<Output = palisade::Result<()>>) {
//! #     tokio::runtime::Runtime::new().unwrap().block_on(f).unwrap();
//! # }
//! ```

mod asking;
mod crowd;
mod guard;
mod health;
mod hold;
mod lane;
mod owners;
mod request;
mod schedule;
mod service;
mod statistics;
mod vitals;
mod wait;
mod wakefulness;
mod watchdog;

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backend::{LockBackend, Push, Sink};
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{Backoff, BreakerOptions, BreakerState, Inspection};
use crate::types::{ClientId, MAX_WAIT, Mode, OwnerId, ResourceKey};

use crowd::Crowds;
use owners::Owners;
use schedule::Schedule;
use service::Service;
use statistics::Counters;
use vitals::Vitals;
use wakefulness::Wakefulness;
use watchdog::Watchdog;

pub use guard::{LockGuard, LockInfo, Locked, LockedKey};
pub use health::LockHealth;
pub use lane::LocalHandOver;
pub use request::LockRequest;
pub use statistics::Statistics;

/// What holds for every request of a lock service unless the request says otherwise.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct LockOptions {
    /// How long a grant lasts unless it is renewed (10 ms to 24 h).
    pub lease: Duration,
    /// How long to wait for keys that others hold.
    pub wait: Duration,
    /// How often a request is repeated that may not stand in line.
    pub retry: Backoff,
    /// The most entries of one owner on one key.
    pub max_entries: u32,
    /// How long one call to the service may take; what is longer than a year counts as that.
    pub call_timeout: Duration,
    /// When a service that fails is left alone, so that requests fail at once.
    pub breaker: BreakerOptions,
    /// The watchdog stops renewing a lock after this time.
    pub max_hold: Duration,
    /// How waiters of this process hand a lock to each other.
    pub hand_over: LocalHandOver,
    /// How long a shutdown waits for guards to be given up.
    pub grace: Duration,
}

impl Default for LockOptions {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(10),
            wait: Duration::from_secs(10),
            retry: Backoff::default(),
            max_entries: 64,
            call_timeout: Duration::from_secs(2),
            breaker: BreakerOptions::default(),
            max_hold: Duration::from_secs(24 * 60 * 60),
            hand_over: LocalHandOver::default(),
            grace: Duration::from_secs(10),
        }
    }
}

impl LockOptions {
    /// With times that can be added to any moment.
    fn bounded(mut self) -> Self {
        self.call_timeout = self.call_timeout.min(MAX_WAIT);
        let open = &mut self.breaker.open;
        (open.first, open.max) = (open.first.min(MAX_WAIT), open.max.min(MAX_WAIT));
        self
    }
}

/// A lock service, as this process uses it. Clones share everything.
#[derive(Clone, Debug)]
pub struct Locks {
    service: Arc<Service>,
}

impl Locks {
    /// Uses `backend` with the default options.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) when the pushes of the service cannot be subscribed
    /// to.
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind.
    pub async fn new(backend: impl LockBackend) -> Result<Self> {
        Self::with_options(Arc::new(backend), LockOptions::default()).await
    }

    /// Uses `backend` with these options. Must be called within a tokio runtime: the watchdog runs
    /// there.
    ///
    /// # Errors
    /// As [`Locks::new`].
    ///
    /// # Cancel safety
    /// Dropping the future leaves nothing behind.
    pub async fn with_options(backend: Arc<dyn LockBackend>, options: LockOptions) -> Result<Self> {
        let (client, options) = (ClientId::random(), options.bounded());
        let (schedule, counters) = (Arc::new(Schedule::new()), Arc::new(Counters::default()));
        let listener = Arc::downgrade(&schedule);
        let sink: Sink = Arc::new(move |push| match (listener.upgrade(), push) {
            (Some(schedule), Push::HandOver(over)) => schedule.hand_over(over.owner, over.grant),
            (Some(schedule), Push::Followed(by)) => schedule.followed(by),
            (None, _) => {}
        });
        backend.subscribe(client, sink).await?;
        let vitals = Arc::new(Vitals::new(options.breaker, options.call_timeout));
        let wakefulness = Arc::new(Wakefulness::new(Arc::clone(&schedule)));
        let watchdog = Watchdog {
            schedule: Arc::clone(&schedule),
            backend: Arc::clone(&backend),
            counters: Arc::clone(&counters),
            vitals: Arc::clone(&vitals),
            wakefulness: Arc::clone(&wakefulness),
            call_timeout: options.call_timeout,
        };
        tokio::spawn(watchdog.run());
        let (owners, closing) = (Arc::new(Owners::default()), CancellationToken::new());
        let service = Arc::new_cyclic(|service| {
            let crowds = Arc::new(Crowds::new(client, options.hand_over, Weak::clone(service)));
            Service {
                backend,
                client,
                options,
                owners,
                crowds,
                schedule,
                counters,
                vitals,
                wakefulness,
                closing,
            }
        });
        Ok(Self { service })
    }

    /// Asks for one key, exclusively unless the request says otherwise.
    pub fn lock(&self, key: impl AsRef<str>) -> LockRequest {
        self.lock_all([key])
    }

    /// Asks for all of `keys` at once, exclusively; add shared ones with [`LockRequest::shared`].
    pub fn lock_all<K: AsRef<str>>(&self, keys: impl IntoIterator<Item = K>) -> LockRequest {
        LockRequest::new(Arc::clone(&self.service), keys, Mode::Exclusive)
    }

    /// A new owner of this service, to be named in several requests, also of other processes.
    /// Requests that name one never pass their locks on within the process.
    #[must_use]
    pub fn owner(&self) -> OwnerId {
        OwnerId::new(self.service.client)
    }

    /// Tells the service that a store has rejected the owner's token: it gets no new grant, and all
    /// that it holds here counts as lost.
    pub fn fence_out(&self, owner: OwnerId) {
        self.service.owners.fence_out(owner);
    }

    /// The options that hold where a request does not say otherwise.
    #[must_use]
    pub fn options(&self) -> LockOptions {
        self.service.options
    }

    /// Whether requests for locks are sent to the service, or refused because it has failed.
    #[must_use]
    pub fn breaker_state(&self) -> BreakerState {
        self.service.vitals.breaker_state()
    }

    /// How the service stands, from what calls have shown. Does no I/O, so it may be asked as often
    /// as one likes; if the service was not probed within 5 s, the watchdog probes it afterwards,
    /// and the next answer knows what came of it.
    ///
    /// ```
    /// # tokio::runtime::Runtime::new().unwrap().block_on(async {
    /// use palisade::Status;
    ///
    /// let locks = palisade::connect("memory:").await?;
    /// assert_eq!(locks.health().status, Status::Up);
    /// # Ok::<(), palisade::Error>(())
    /// # }).unwrap();
    /// ```
    #[must_use]
    pub fn health(&self) -> LockHealth {
        let Service { vitals, schedule, closing, .. } = &*self.service;
        vitals.health(closing.is_cancelled() || !schedule.is_alive())
    }

    /// What was done so far.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.service.counters.snapshot()
    }

    /// Shows who holds a key and who waits for it, as the service sees it: waiters of one process
    /// that pass a lock among themselves have one entry, under an owner that stands for all of them
    /// ([`OwnerId::is_group`]). A request that names that owner is refused.
    ///
    /// # Errors
    /// [`InvalidInput`](ErrorKind::InvalidInput) for a bad key, and the errors of the service.
    ///
    /// # Cancel safety
    /// Dropping the future has no effect.
    pub async fn inspect(&self, key: impl AsRef<str>) -> Result<Inspection> {
        let key = ResourceKey::parse(key)?;
        let partition = key.partition(self.service.backend.capabilities().partitions);
        self.service.call(self.service.backend.inspect(partition, &key)).await
    }

    /// Ends the service in an orderly way: new requests are refused and waiting ones end, guards
    /// have [`LockOptions::grace`] to be given up, and what is still held then is taken away and
    /// released.
    ///
    /// # Errors
    /// [`TimedOut`](ErrorKind::TimedOut) when guards were still held at the end of the grace, and
    /// [`Unavailable`](ErrorKind::Unavailable) when releases could not be sent; those expire.
    ///
    /// # Cancel safety
    /// The service stays closed; what was not given up yet stays held. Call it again to go on.
    pub async fn shutdown(&self) -> Result<()> {
        let Service { closing, schedule, options, .. } = &*self.service;
        closing.cancel();
        if tokio::time::timeout(options.grace, schedule.emptied()).await.is_ok() {
            return Ok(());
        }
        let taken = schedule.take_away(Instant::now());
        let settled = tokio::time::timeout(options.call_timeout, schedule.emptied()).await;
        let (kind, what) = match settled {
            Ok(()) => (ErrorKind::TimedOut, "released"),
            Err(_) => (ErrorKind::Unavailable, "left to expire"),
        };
        let detail =
            format!("{taken} locks were still held after {:?} and were {what}", options.grace);
        Err(Error::new(kind, "shutdown", detail))
    }
}
