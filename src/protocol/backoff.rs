//! Waiting between attempts.

use std::time::Duration;

/// How long to wait between attempts, as a value.
///
/// The delay starts at `first`, grows by `multiplier` up to `max`, and is shortened by a random
/// part of up to `jitter` (a fraction of the delay), so that those who failed together do not come
/// back together. Attempts end when `max_elapsed` has passed since the first one.
///
/// ```
/// use palisade::Backoff;
/// use std::time::Duration;
///
/// let patient = Backoff { max_elapsed: Duration::from_secs(60), ..Backoff::default() };
/// let first = patient.delay(0, 0.0, Duration::ZERO).expect("there is time");
/// assert_eq!(first, patient.first);
/// assert_eq!(patient.delay(3, 0.0, Duration::from_secs(60)), None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backoff {
    /// The delay before the second attempt.
    pub first: Duration,
    /// The longest delay.
    pub max: Duration,
    /// The growth from one delay to the next; below 1 it counts as 1.
    pub multiplier: f64,
    /// The part of the delay, 0 to 1, that chance may take away.
    pub jitter: f64,
    /// No attempt starts later than this after the first one.
    pub max_elapsed: Duration,
}

impl Default for Backoff {
    /// 10 ms doubling up to 1 s, half of it random, for 30 s.
    fn default() -> Self {
        Self {
            first: Duration::from_millis(10),
            max: Duration::from_secs(1),
            multiplier: 2.0,
            jitter: 0.5,
            max_elapsed: Duration::from_secs(30),
        }
    }
}

impl Backoff {
    /// No second attempt at all.
    #[must_use]
    pub fn never() -> Self {
        Self { max_elapsed: Duration::ZERO, ..Self::default() }
    }

    /// The delay after attempt number `attempt` (from 0), or `None` when the time is used up.
    ///
    /// `chance` is a random number in `0.0..1.0`; `elapsed` counts from the start of the first
    /// attempt.
    #[must_use]
    pub fn delay(&self, attempt: u32, chance: f64, elapsed: Duration) -> Option<Duration> {
        let growth = self.multiplier.max(1.0).powi(i32::try_from(attempt).unwrap_or(i32::MAX));
        let full = (self.first.as_secs_f64() * growth).min(self.max.as_secs_f64());
        let kept = 1.0 - self.jitter.clamp(0.0, 1.0) * chance.clamp(0.0, 1.0);
        let delay = Duration::try_from_secs_f64(full * kept).unwrap_or(self.max);
        (elapsed + delay < self.max_elapsed).then_some(delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_maximum_and_stop_at_the_end_of_the_time() {
        let policy = Backoff { jitter: 0.0, ..Backoff::default() };
        let delays: Vec<_> = (0..9).filter_map(|n| policy.delay(n, 0.7, Duration::ZERO)).collect();
        assert_eq!(delays[0], Duration::from_millis(10));
        assert_eq!(delays[1], Duration::from_millis(20));
        assert_eq!(delays[8], Duration::from_secs(1));
        assert_eq!(policy.delay(u32::MAX, 0.0, Duration::ZERO), Some(Duration::from_secs(1)));
        assert_eq!(policy.delay(0, 0.0, Duration::from_secs(30)), None);
        assert_eq!(Backoff::never().delay(0, 0.0, Duration::ZERO), None);
    }

    #[test]
    fn jitter_only_shortens() {
        let policy = Backoff::default();
        for chance in [0.0, 0.3, 0.999] {
            let delay = policy.delay(2, chance, Duration::ZERO).unwrap();
            assert!(delay <= Duration::from_millis(40) && delay >= Duration::from_millis(20));
        }
    }
}
