//! What a lock service has done so far, counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::error::{Error, ErrorKind};
use crate::protocol::BreakerState;

/// A snapshot of what a [`Locks`](crate::Locks) has done since it was made.
///
/// A grant counts once for all the keys it covers in one partition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Statistics {
    /// Grants.
    pub acquired: u64,
    /// Requests that ended without a grant, time-outs among them.
    pub failed: u64,
    /// Requests that waited until their deadline.
    pub timed_out: u64,
    /// Grants that were given up.
    pub released: u64,
    /// Renewals that were acknowledged.
    pub renewed: u64,
    /// Grants that were lost before they were given up.
    pub lost: u64,
    /// Grants that are held now.
    pub active: u64,
    /// Requests that wait in line now, for the service or for others of this process.
    pub waiting: u64,
    /// The mean time from grant to release, of those that were given up.
    pub mean_hold: Duration,
}

/// Counts, and tells the `metrics` facade where that feature is on.
#[derive(Debug, Default)]
pub(super) struct Counters {
    acquired: AtomicU64,
    failed: AtomicU64,
    timed_out: AtomicU64,
    released: AtomicU64,
    renewed: AtomicU64,
    lost: AtomicU64,
    waiting: AtomicU64,
    ended: AtomicU64,
    hold_us: AtomicU64,
}

impl Counters {
    pub(super) fn snapshot(&self) -> Statistics {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let released = read(&self.released);
        Statistics {
            acquired: read(&self.acquired),
            failed: read(&self.failed),
            timed_out: read(&self.timed_out),
            released,
            renewed: read(&self.renewed),
            lost: read(&self.lost),
            active: read(&self.acquired).saturating_sub(read(&self.ended)),
            waiting: read(&self.waiting),
            mean_hold: Duration::from_micros(read(&self.hold_us) / released.max(1)),
        }
    }

    /// A request waits in line, until what is returned is dropped.
    pub(super) fn waits(&self) -> Waits<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        observe::waits();
        Waits(self)
    }

    /// A request got all it asked for.
    pub(super) fn waited(&self, waited: Duration) {
        observe::waited(waited);
    }

    /// A grant began.
    pub(super) fn granted(&self) {
        self.acquired.fetch_add(1, Ordering::Relaxed);
        observe::granted();
    }

    pub(super) fn failed(&self, error: &Error) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        if error.kind() == ErrorKind::TimedOut {
            self.timed_out.fetch_add(1, Ordering::Relaxed);
        }
        observe::failed(error.kind());
    }

    /// A grant was given up by its holder, in time or not.
    pub(super) fn released(&self, held_for: Duration) {
        self.released.fetch_add(1, Ordering::Relaxed);
        self.ended.fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(held_for.as_micros()).unwrap_or(u64::MAX);
        self.hold_us.fetch_add(micros, Ordering::Relaxed);
        observe::released(held_for);
    }

    pub(super) fn renewed(&self) {
        self.renewed.fetch_add(1, Ordering::Relaxed);
        observe::renewed();
    }

    pub(super) fn lost(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
        observe::lost();
    }
}

/// One request that waits in line.
pub(super) struct Waits<'a>(&'a Counters);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
        observe::waits_no_more();
    }
}

/// The state of the breaker, as it is at first.
pub(super) fn breaker_is(state: BreakerState) {
    observe::breaker(state);
}

/// The state of the breaker has changed.
pub(super) fn breaker_turned(to: BreakerState) {
    observe::breaker(to);
    observe::turned(to);
}

/// The names are in `src/docs/metrics.md`. Labels are bounded: never a key.
#[cfg(feature = "metrics")]
mod observe {
    use std::time::Duration;

    use metrics::{counter, gauge, histogram};

    use crate::error::ErrorKind;
    use crate::protocol::BreakerState;

    pub(super) fn breaker(state: BreakerState) {
        gauge!("palisade_breaker_state").set(match state {
            BreakerState::Closed => 0.0,
            BreakerState::HalfOpen => 1.0,
            BreakerState::Open => 2.0,
        });
    }

    pub(super) fn turned(to: BreakerState) {
        let to = match to {
            BreakerState::Closed => "closed",
            BreakerState::HalfOpen => "half_open",
            BreakerState::Open => "open",
        };
        counter!("palisade_breaker_transitions_total", "to" => to).increment(1);
    }

    pub(super) fn waits() {
        gauge!("palisade_locks_waiting").increment(1);
    }

    pub(super) fn waits_no_more() {
        gauge!("palisade_locks_waiting").decrement(1);
    }

    pub(super) fn waited(waited: Duration) {
        histogram!("palisade_lock_wait_seconds").record(waited);
    }

    pub(super) fn granted() {
        counter!("palisade_lock_acquired_total").increment(1);
        gauge!("palisade_locks_active").increment(1);
    }

    pub(super) fn failed(kind: ErrorKind) {
        counter!("palisade_lock_failed_total", "kind" => format!("{kind:?}")).increment(1);
    }

    pub(super) fn released(held_for: Duration) {
        counter!("palisade_lock_released_total").increment(1);
        gauge!("palisade_locks_active").decrement(1);
        histogram!("palisade_lock_hold_seconds").record(held_for);
    }

    pub(super) fn renewed() {
        counter!("palisade_lock_renewed_total").increment(1);
    }

    pub(super) fn lost() {
        counter!("palisade_lock_lost_total").increment(1);
    }
}

#[cfg(not(feature = "metrics"))]
mod observe {
    use std::time::Duration;

    use crate::error::ErrorKind;
    use crate::protocol::BreakerState;

    pub(super) fn breaker(_state: BreakerState) {}
    pub(super) fn turned(_to: BreakerState) {}
    pub(super) fn waits() {}
    pub(super) fn waits_no_more() {}
    pub(super) fn waited(_waited: Duration) {}
    pub(super) fn granted() {}
    pub(super) fn failed(_kind: ErrorKind) {}
    pub(super) fn released(_held_for: Duration) {}
    pub(super) fn renewed() {}
    pub(super) fn lost() {}
}
