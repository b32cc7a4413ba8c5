//! Asking for locks.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::Instrument;

use crate::error::{Error, ErrorKind, Result};
use crate::protocol::Backoff;
use crate::types::{
    FencingToken, Lease, LeaseState, MAX_KEYS, MAX_WAIT, Mode, OwnerId, ResourceKey, Want,
};

use super::guard::{LockGuard, Locked};
use super::service::{Order, Service};

/// A request for locks, to be sent by one of its last four methods.
///
/// Bad keys and bad leases are reported there, before anything is sent.
#[derive(Clone, Debug)]
#[must_use = "nothing is locked until the request is sent"]
pub struct LockRequest {
    service: Arc<Service>,
    wants: Result<Vec<Want>, ErrorParts>,
    owner: Option<OwnerId>,
    lent: bool,
    lease: Duration,
    wait: Duration,
    retry: Backoff,
    limit: u32,
    floor: Option<FencingToken>,
    metadata: Option<String>,
    renews: bool,
    max_hold: Duration,
    state: Option<Arc<LeaseState>>,
}

/// What is kept of an error until the request is sent; errors themselves cannot be cloned.
type ErrorParts = String;

impl LockRequest {
    pub(super) fn new<K: AsRef<str>>(
        service: Arc<Service>,
        keys: impl IntoIterator<Item = K>,
        mode: Mode,
    ) -> Self {
        let options = service.options;
        let request = Self {
            service,
            wants: Ok(Vec::new()),
            owner: None,
            lent: false,
            lease: options.lease,
            wait: options.wait.min(MAX_WAIT),
            retry: options.retry,
            limit: options.max_entries,
            floor: None,
            metadata: None,
            renews: true,
            max_hold: options.max_hold.min(MAX_WAIT),
            state: None,
        };
        request.with(keys, mode)
    }

    fn with<K: AsRef<str>>(mut self, keys: impl IntoIterator<Item = K>, mode: Mode) -> Self {
        if let Ok(wants) = &mut self.wants {
            let keys = keys.into_iter();
            wants.reserve_exact(keys.size_hint().0.min(MAX_KEYS));
            for key in keys {
                match ResourceKey::parse(key) {
                    Ok(key) => wants.push(Want::new(key, mode)),
                    Err(invalid) => {
                        self.wants = Err(invalid.to_string());
                        break;
                    }
                }
            }
        }
        self
    }

    /// Adds keys to be held shared. A key that is named in both modes is held exclusively.
    pub fn shared<K: AsRef<str>>(self, keys: impl IntoIterator<Item = K>) -> Self {
        self.with(keys, Mode::Shared)
    }

    /// How long the grant lasts unless it is renewed: 10 ms to 24 h.
    pub fn ttl(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// How long [`LockRequest::acquire`] and [`LockRequest::with_lock`] wait. Zero tries once.
    ///
    /// The service has at least a tenth of [`LockOptions::call_timeout`](crate::LockOptions) to
    /// answer at all, however short the wait, unless others of this process are before this
    /// request.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait.min(MAX_WAIT);
        self
    }

    /// The owner to re-enter as, or to add locks to. Without one, each request is an owner of its
    /// own.
    pub fn owner(mut self, owner: OwnerId) -> Self {
        self.owner = Some(owner);
        self.lent = true;
        self
    }

    /// An owner that was made for this request: it is not named in others before this one is
    /// granted, nor in another process ever.
    #[doc(hidden)]
    pub fn new_owner(mut self, owner: OwnerId) -> Self {
        self.owner = Some(owner);
        self.lent = false;
        self
    }

    /// How often a request is repeated that may not stand in line.
    pub fn retry(mut self, retry: Backoff) -> Self {
        self.retry = retry;
        self
    }

    /// The most entries that the owner may have on one key.
    pub fn max_entries(mut self, limit: u32) -> Self {
        self.limit = limit;
        self
    }

    /// Tokens must exceed `floor`: the highest one a store has reported.
    pub fn floor(mut self, floor: Option<FencingToken>) -> Self {
        self.floor = floor;
        self
    }

    /// Free text that is shown to whoever inspects the key.
    pub fn metadata(mut self, text: impl Into<String>) -> Self {
        self.metadata = Some(text.into());
        self
    }

    /// Whether the watchdog renews. Without it the lock ends after its lease unless
    /// [`LockGuard::renew`] is called.
    pub fn auto_renew(mut self, renews: bool) -> Self {
        self.renews = renews;
        self
    }

    /// The watchdog stops renewing after this time, so that a guard that was leaked does not hold
    /// its locks for ever.
    pub fn max_hold(mut self, max_hold: Duration) -> Self {
        self.max_hold = max_hold.min(MAX_WAIT);
        self
    }

    /// Lets several requests share one lease state.
    #[doc(hidden)]
    pub fn state(mut self, state: Arc<LeaseState>) -> Self {
        self.state = Some(state);
        self
    }

    /// Locks all keys, waiting in line for them.
    ///
    /// # Errors
    /// - [`InvalidInput`](ErrorKind::InvalidInput): no key, too many, a bad key or lease, or an
    ///   owner that stands for a group; nothing was sent.
    /// - [`TimedOut`](ErrorKind::TimedOut): others held a key until the wait was over;
    ///   [`Busy`](ErrorKind::Busy) when the request was not to wait.
    /// - [`WouldDeadlock`](ErrorKind::WouldDeadlock): the owner holds other keys, and waiting for
    ///   these could deadlock.
    /// - [`LimitReached`](ErrorKind::LimitReached), [`StaleToken`](ErrorKind::StaleToken),
    ///   [`Unavailable`](ErrorKind::Unavailable), [`Denied`](ErrorKind::Denied),
    ///   [`Corrupt`](ErrorKind::Corrupt), [`Closed`](ErrorKind::Closed).
    ///
    /// # Cancel safety
    /// Dropping the future cancels the request, in line or granted, in the background; the place in
    /// the line is lost.
    pub async fn acquire(self) -> Result<LockGuard> {
        let wait = (!self.wait.is_zero()).then_some(self.wait);
        self.send(wait).await
    }

    /// Locks all keys if they are free now; `None` when somebody else has one of them.
    ///
    /// # Errors
    /// As [`LockRequest::acquire`], without `TimedOut`.
    ///
    /// # Cancel safety
    /// As [`LockRequest::acquire`].
    pub async fn try_acquire(self) -> Result<Option<LockGuard>> {
        match self.send(None).await {
            Ok(guard) => Ok(Some(guard)),
            Err(error) if error.kind() == ErrorKind::Busy => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Runs `work` under the locks and gives them up again.
    ///
    /// When the lease is lost, the future of `work` is dropped where it stands.
    ///
    /// # Errors
    /// The error of `work`; those of [`LockRequest::acquire`]; and
    /// [`LeaseLost`](ErrorKind::LeaseLost) when the lease did not last until the end, even if
    /// `work` had succeeded; that one is never advised to be retried, because the work may be done.
    ///
    /// # Cancel safety
    /// Dropping the future drops `work` and gives the locks up in the background.
    pub async fn with_lock<T, E, F, Fut>(self, work: F) -> Result<T, E>
    where
        E: From<Error>,
        F: FnOnce(Locked) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let guard = self.acquire().await?;
        guard.run(work).await
    }

    /// As [`LockRequest::with_lock`], but `None` at once when the locks are not free.
    ///
    /// # Errors
    /// As [`LockRequest::with_lock`].
    ///
    /// # Cancel safety
    /// As [`LockRequest::with_lock`].
    pub async fn try_with_lock<T, E, F, Fut>(self, work: F) -> Result<Option<T>, E>
    where
        E: From<Error>,
        F: FnOnce(Locked) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        match self.try_acquire().await? {
            Some(guard) => guard.run(work).await.map(Some),
            None => Ok(None),
        }
    }

    async fn send(mut self, wait: Option<Duration>) -> Result<LockGuard> {
        let order = self.order(wait)?;
        let keys = order.wants.len();
        let span = tracing::debug_span!("palisade.acquire", owner = %order.owner, keys);
        let holds = self.service.acquire(&order).instrument(span).await?;
        let Order { owner, state, metadata, .. } = order;
        Ok(LockGuard::new(self.service, owner, state, holds, metadata))
    }

    /// Checks everything before anything is sent.
    fn order(&mut self, wait: Option<Duration>) -> Result<Order> {
        let invalid = |detail: String| Error::new(ErrorKind::InvalidInput, "acquire", detail);
        let wants = std::mem::replace(&mut self.wants, Ok(Vec::new())).map_err(invalid)?;
        if wants.is_empty() {
            return Err(invalid("no key was named; name at least one".to_owned()));
        }
        if self.owner.is_some_and(OwnerId::is_group) {
            let detail = "the owner stands for a group of waiters of one process, and what it \
                          holds is now one's and now another's; to share a lock, name an owner \
                          that was made by `Locks::owner` in all requests";
            return Err(invalid(detail.to_owned()));
        }
        let partitions = self.service.backend.capabilities().partitions;
        let place = |want: Want| (want.key.partition(partitions), want);
        let mut wants: Vec<_> = wants.into_iter().map(place).collect();
        // Exclusive first among equals, so that it is the one that stays.
        wants.sort_by(|(p, a), (q, b)| (p, &a.key, b.mode).cmp(&(q, &b.key, a.mode)));
        wants.dedup_by(|(_, b), (_, a)| a.key == b.key);
        if wants.len() > MAX_KEYS {
            let given = wants.len();
            return Err(invalid(format!("{given} keys were named; at most {MAX_KEYS} may be")));
        }
        Ok(Order {
            wants,
            owner: self.owner.unwrap_or_else(|| OwnerId::new(self.service.client)),
            lent: self.lent,
            lease: Lease::new(self.lease)?,
            deadline: wait.map(|wait| Instant::now() + wait),
            retry: self.retry,
            limit: self.limit,
            floor: self.floor,
            metadata: self.metadata.take(),
            renews: self.renews,
            max_hold: self.max_hold,
            state: self.state.take().unwrap_or_default(),
        })
    }
}

impl LockGuard {
    async fn run<T, E, F, Fut>(self, work: F) -> Result<T, E>
    where
        E: From<Error>,
        F: FnOnce(Locked) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        let locked = self.locked().clone();
        let answer = tokio::select! {
            biased;
            () = locked.lost() => None,
            answer = work(locked.clone()) => Some(answer),
        };
        let released = self.release().await;
        match (answer, released) {
            (Some(Err(error)), _) => Err(error),
            (Some(Ok(value)), released) if !matters(&released) => Ok(value),
            (_, Err(error)) => Err(error.with_no_retry().into()),
            (_, Ok(())) => Err(lost_midway().into()),
        }
    }
}

/// A release that was not answered is the watchdog's business, not the caller's.
fn matters(released: &Result<()>) -> bool {
    released.as_ref().is_err_and(Error::is_fenced_out)
}

fn lost_midway() -> Error {
    let detail = "the lease was lost while the work ran, or before it could be given up";
    Error::new(ErrorKind::LeaseLost, "with_lock", detail).with_no_retry()
}
