//! How long the host was suspended.
//!
//! The clock that leases are counted on stands still while a host is suspended; the service's clock
//! runs on. A second clock, which runs on too, shows the difference.

use std::time::Duration;

/// What is less than this may be the time between two looks at two clocks.
const NOISE: Duration = Duration::from_millis(1);

/// Compares a clock that stands still in a suspended host with one that does not.
///
/// The clock that runs on has to be read first: if the process is interrupted between the two, the
/// gap then looks smaller than it is, and a lease is never taken for shorter than it is.
#[derive(Clone, Copy, Debug)]
pub struct Suspensions {
    gap: Duration,
}

impl Suspensions {
    /// Begins with what the clocks show now: the one that runs on, and the one that stands still.
    #[must_use]
    pub fn new(all: Duration, awake: Duration) -> Self {
        Self { gap: all.saturating_sub(awake) }
    }

    /// For how long the host was suspended since this was last asked.
    pub fn since(&mut self, all: Duration, awake: Duration) -> Duration {
        let gap = all.saturating_sub(awake);
        let slept = gap.saturating_sub(self.gap);
        if slept < NOISE {
            return Duration::ZERO;
        }
        self.gap = gap;
        slept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn what_only_one_clock_counts_was_slept_and_is_told_once() {
        let mut suspensions = Suspensions::new(ms(5_000), ms(3_000));
        assert_eq!(suspensions.since(ms(6_000), ms(4_000)), ms(0));
        assert_eq!(suspensions.since(ms(16_500), ms(4_500)), ms(10_000));
        assert_eq!(suspensions.since(ms(16_600), ms(4_600)), ms(0));
        assert_eq!(suspensions.since(ms(16_700), ms(4_650)), ms(50));
    }

    #[test]
    fn an_interruption_between_the_looks_is_no_suspension_and_hides_none() {
        let mut suspensions = Suspensions::new(ms(100), ms(100));
        assert_eq!(suspensions.since(ms(200), ms(290)), ms(0), "read 90 ms apart");
        assert_eq!(suspensions.since(ms(1_300), ms(300)), ms(1_000));
    }

    #[test]
    fn noise_is_not_told_and_not_forgotten() {
        let mut suspensions = Suspensions::new(ms(0), ms(0));
        let told: Duration = (1..=100)
            .map(|n| suspensions.since(ms(10 * n) + Duration::from_micros(300 * n), ms(10 * n)))
            .sum();
        assert!(told > ms(28) && told <= ms(30), "{told:?}");
    }
}
