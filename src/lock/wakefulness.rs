//! Whether the host was suspended: its clocks, and what follows for the leases.
//!
//! It is looked at before and after each call that begins or extends a lease, and whenever the
//! watchdog works. So leases are shortened once, by what was slept while they lasted.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::protocol::Suspensions;

use super::schedule::Schedule;

/// Adds up how long the host was suspended.
#[derive(Debug)]
pub(super) struct Wakefulness {
    schedule: Arc<Schedule>,
    seen: Option<Mutex<Seen>>,
}

#[derive(Debug)]
struct Seen {
    suspensions: Suspensions,
    total: Duration,
}

impl Wakefulness {
    pub(super) fn new(schedule: Arc<Schedule>) -> Self {
        let seen = clocks().map(|(all, awake)| {
            let suspensions = Suspensions::new(all, awake);
            Mutex::new(Seen { suspensions, total: Duration::ZERO })
        });
        Self { schedule, seen }
    }

    /// For how long the host was suspended since this was made; leases that ended meanwhile are
    /// lost when this returns. Always zero where the system has no clock that would tell.
    pub(super) fn slept(&self) -> Duration {
        let (Some(seen), Some((all, awake))) = (&self.seen, clocks()) else {
            return Duration::ZERO;
        };
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        let slept = seen.suspensions.since(all, awake);
        if !slept.is_zero() {
            tracing::warn!(?slept, "the host was suspended");
            seen.total += slept;
            self.schedule.slept(slept, Instant::now());
        }
        seen.total
    }

    /// When a call was sent, at `sent` and after so much sleep, as if nothing had been slept since.
    pub(super) fn sent(&self, sent: Instant, slept: Duration) -> Instant {
        sent.checked_sub(self.slept().saturating_sub(slept)).unwrap_or(sent)
    }
}

/// The clock that runs on in a suspended host, and the one that stands still; read in this order.
#[cfg(target_os = "linux")]
fn clocks() -> Option<(Duration, Duration)> {
    use rustix::time::{ClockId, Timespec, clock_gettime};

    let read = |clock| {
        let Timespec { tv_sec, tv_nsec } = clock_gettime(clock);
        let nanos = u32::try_from(tv_nsec).unwrap_or(0);
        Duration::new(u64::try_from(tv_sec).unwrap_or(0), nanos)
    };
    let all = read(ClockId::Boottime);
    Some((all, read(ClockId::Monotonic)))
}

#[cfg(not(target_os = "linux"))]
fn clocks() -> Option<(Duration, Duration)> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_runs_does_not_sleep() {
        let wakefulness = Wakefulness::new(Arc::new(Schedule::new()));
        assert!(wakefulness.slept() < Duration::from_secs(1), "{wakefulness:?}");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn both_clocks_run_and_one_is_ahead() {
        let (all, awake) = clocks().unwrap();
        let (all_later, awake_later) = clocks().unwrap();
        assert!(all_later >= all && awake_later > awake && all_later + NOISE > awake_later);
    }

    const NOISE: Duration = Duration::from_secs(5);
}
