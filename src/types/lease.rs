//! How long a grant lasts, and whether it still does.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::RequestId;

/// The shortest lease.
pub const MIN_LEASE: Duration = Duration::from_millis(10);
/// The longest lease.
pub const MAX_LEASE: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest wait and the longest hold; what is longer counts as this.
pub const MAX_WAIT: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// The time that a grant lasts unless it is renewed, with what follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lease(Duration);

/// The lease is shorter than [`MIN_LEASE`] or longer than [`MAX_LEASE`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a lease of {0:?} is out of range: it must be between 10 ms and 24 h")]
pub struct InvalidLease(pub Duration);

impl Lease {
    /// Checks that `duration` can be a lease; what is finer than a millisecond is cut off.
    ///
    /// # Errors
    /// [`InvalidLease`] outside [`MIN_LEASE`]`..=`[`MAX_LEASE`].
    pub fn new(duration: Duration) -> Result<Self, InvalidLease> {
        if (MIN_LEASE..=MAX_LEASE).contains(&duration) {
            let whole = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
            Ok(Self(Duration::from_millis(whole)))
        } else {
            Err(InvalidLease(duration))
        }
    }

    /// The lease as a duration.
    #[must_use]
    pub fn get(self) -> Duration {
        self.0
    }

    /// The lease in milliseconds.
    #[must_use]
    pub fn as_millis(self) -> u64 {
        u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX)
    }

    /// How often a waiter says that it still waits: a third of the lease, at most 10 s.
    #[must_use]
    pub fn refresh(self) -> Duration {
        (self.0 / 3).min(Duration::from_secs(10))
    }

    /// How long a waiter lives that stops refreshing: three refreshes.
    #[must_use]
    pub fn waiter(self) -> Duration {
        self.refresh() * 3
    }

    /// How long a grant that was handed over lasts until its holder first renews it.
    ///
    /// Two refreshes: longer than one refresh and a round trip, or a lost push would lose the
    /// grant.
    #[must_use]
    pub fn claim(self) -> Duration {
        self.refresh() * 2
    }

    /// What the client takes off its own deadline because two clocks never run at one speed.
    #[must_use]
    pub fn drift(self) -> Duration {
        drift(self.0)
    }

    /// How much of a claim the client counts on.
    #[must_use]
    pub fn sure_claim(self) -> Duration {
        self.claim() - drift(self.claim())
    }
}

/// One percent and a millisecond.
fn drift(duration: Duration) -> Duration {
    duration / 100 + Duration::from_millis(1)
}

impl TryFrom<Duration> for Lease {
    type Error = InvalidLease;

    fn try_from(duration: Duration) -> Result<Self, InvalidLease> {
        Self::new(duration)
    }
}

/// What everyone who works under a set of grants shares: their deadlines, and the moment one was
/// lost.
///
/// A state is lost, or given up, once and for ever. It counts as lost as soon as one deadline has
/// passed on the monotonic clock of this process, whether or not a timer has noticed.
#[derive(Debug, Default)]
pub struct LeaseState {
    covered: Mutex<Vec<Covered>>,
    lost: CancellationToken,
    /// Told when one of them may be in danger sooner than before.
    sooner: Notify,
}

/// A grant, and how long it lasts.
#[derive(Debug)]
struct Covered {
    request: RequestId,
    deadline: Instant,
    /// When it is in danger unless it is renewed.
    expiring: Instant,
}

impl Covered {
    fn new(request: RequestId, deadline: Instant) -> Self {
        let left = deadline.saturating_duration_since(Instant::now());
        Self { request, deadline, expiring: deadline - left / 3 }
    }
}

impl LeaseState {
    /// A state that ends at `deadline` and is never extended.
    #[must_use]
    pub fn new(deadline: Instant) -> Self {
        let state = Self::default();
        state.cover(RequestId::next(), deadline);
        state
    }

    /// Adds a grant that lasts until `deadline`.
    pub fn cover(&self, request: RequestId, deadline: Instant) {
        let mut covered = self.covered();
        if covered.is_empty() {
            covered.reserve_exact(1); // most states cover no second one
        }
        covered.push(Covered::new(request, deadline));
        drop(covered);
        self.sooner.notify_waiters();
    }

    /// Moves the deadline of a grant that is covered. It never moves back, and what is lost stays
    /// lost.
    pub fn extend(&self, request: RequestId, deadline: Instant) {
        if self.is_held()
            && let Some(covered) = self.covered().iter_mut().find(|one| one.request == request)
            && covered.deadline < deadline
        {
            *covered = Covered::new(request, deadline);
        }
    }

    /// Takes time off a grant: the host was suspended for as long, while the service's clock ran.
    pub fn shorten(&self, request: RequestId, by: Duration) {
        let mut covered = self.covered();
        for covered in covered.iter_mut().filter(|one| one.request == request) {
            let earlier = |at: Instant| at.checked_sub(by).unwrap_or_else(Instant::now);
            covered.deadline = earlier(covered.deadline);
            covered.expiring = earlier(covered.expiring);
        }
        drop(covered);
        self.sooner.notify_waiters();
    }

    /// Takes a grant out that was given up. With the last one, the state counts as lost: whoever
    /// still looks at it must not take the keys for held.
    pub fn uncover(&self, request: RequestId) {
        let mut covered = self.covered();
        let before = covered.len();
        covered.retain(|one| one.request != request);
        let given_up = covered.is_empty() && before > 0;
        drop(covered);
        if given_up {
            self.lose();
        }
    }

    /// When the first of the grants ends unless it is renewed; `None` without any.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.covered().iter().map(|one| one.deadline).min()
    }

    /// When the grant of `request` ends unless it is renewed; `None` when it is not covered.
    #[must_use]
    pub fn deadline_of(&self, request: RequestId) -> Option<Instant> {
        self.covered().iter().find(|one| one.request == request).map(|one| one.deadline)
    }

    /// Whether a third or less is left of what was granted last for one of the grants, or it is
    /// lost.
    #[must_use]
    pub fn is_expiring(&self) -> bool {
        !self.is_held() || self.expiring_at().is_some_and(|at| at <= Instant::now())
    }

    /// Resolves when [`is_expiring`](LeaseState::is_expiring) holds. It may cease to hold later,
    /// when a renewal succeeds after all.
    ///
    /// # Cancel safety
    /// Dropping the future has no effect.
    pub async fn expiring(&self) {
        loop {
            // Before it is looked at, so that no change in between is missed.
            let sooner = self.sooner.notified();
            if self.is_expiring() {
                return;
            }
            let at = self.expiring_at();
            tokio::select! {
                () = self.lost.cancelled() => {}
                () = sooner => {}
                () = sleep_until(at.unwrap_or_else(Instant::now)), if at.is_some() => {}
            }
        }
    }

    fn expiring_at(&self) -> Option<Instant> {
        self.covered().iter().map(|one| one.expiring).min()
    }

    /// Whether every grant is still held. Marks the state as lost when a deadline has passed.
    #[must_use]
    pub fn is_held(&self) -> bool {
        if self.lost.is_cancelled() {
            return false;
        }
        if self.deadline().is_none_or(|deadline| Instant::now() < deadline) {
            return true;
        }
        self.lose();
        false
    }

    /// Marks the state as lost.
    pub fn lose(&self) {
        self.lost.cancel();
    }

    /// Is cancelled when the state is lost.
    #[must_use]
    pub fn lost(&self) -> &CancellationToken {
        &self.lost
    }

    fn covered(&self) -> MutexGuard<'_, Vec<Covered>> {
        self.covered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_outside_its_range_is_refused_with_the_range() {
        for bad in [Duration::ZERO, Duration::from_millis(9), MAX_LEASE + Duration::from_millis(1)]
        {
            let error = Lease::new(bad).unwrap_err();
            assert!(error.to_string().contains("between 10 ms and 24 h"), "{error}");
        }
    }

    #[test]
    fn a_claim_outlasts_a_refresh_whatever_the_lease() {
        for lease in [MIN_LEASE, Duration::from_secs(30), Duration::from_secs(3600), MAX_LEASE] {
            let lease = Lease::new(lease).unwrap();
            assert!(lease.sure_claim() > lease.refresh(), "{lease:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_passed_deadline_is_a_loss_even_before_a_timer_sees_it() {
        let (state, request) = (LeaseState::default(), RequestId::next());
        state.cover(request, Instant::now() + Duration::from_secs(1));
        assert!(state.is_held());
        tokio::time::advance(Duration::from_secs(2)).await;
        state.extend(request, Instant::now() + Duration::from_secs(5));
        assert!(!state.is_held(), "what is lost stays lost");
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_expiring_when_a_third_is_left_and_not_after_a_renewal() {
        let (state, request, begun) = (LeaseState::default(), RequestId::next(), Instant::now());
        state.cover(request, begun + Duration::from_secs(9));
        state.expiring().await;
        assert_eq!(begun.elapsed().as_secs(), 6);
        assert!(state.is_expiring() && state.is_held());
        state.extend(request, begun + Duration::from_secs(15));
        assert!(!state.is_expiring());
        state.expiring().await;
        assert_eq!(begun.elapsed().as_secs(), 12);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_for_the_danger_learns_that_it_comes_sooner() {
        let seconds = Duration::from_secs;
        let (state, request, begun) = (LeaseState::default(), RequestId::next(), Instant::now());
        state.cover(request, begun + seconds(90));
        let waits = async || {
            state.expiring().await;
            begun.elapsed().as_secs()
        };
        let second = RequestId::next();
        let (at, ()) = tokio::join!(waits(), async { state.cover(second, begun + seconds(9)) });
        assert_eq!(at, 6, "it is in danger with another grant");
        state.extend(second, begun + seconds(900));
        let (at, ()) = tokio::join!(waits(), async { state.shorten(request, seconds(50)) });
        assert_eq!(at, 10, "it is in danger after a suspension");
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_host_slept_is_taken_off_a_lease() {
        let (state, now) = (LeaseState::default(), Instant::now());
        let (short, long) = (RequestId::next(), RequestId::next());
        state.cover(short, now + Duration::from_secs(3));
        state.cover(long, now + Duration::from_secs(9));
        state.shorten(long, Duration::from_secs(5));
        assert_eq!(state.deadline_of(long), Some(now + Duration::from_secs(4)));
        assert!(state.is_held());
        state.shorten(short, Duration::from_secs(5));
        assert!(!state.is_held());
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_deadline_of_several_counts() {
        let (state, now) = (LeaseState::default(), Instant::now());
        let (short, long) = (RequestId::next(), RequestId::next());
        state.cover(short, now + Duration::from_secs(1));
        state.cover(long, now + Duration::from_secs(9));
        assert_eq!(state.deadline(), Some(now + Duration::from_secs(1)));
        state.uncover(short);
        assert_eq!(state.deadline(), Some(now + Duration::from_secs(9)));
    }
}
