//! How long a call waits, and how often anybody connects.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use crate::protocol::Backoff;

/// How long one call bears with a server that is out of reach or out of sorts.
pub(super) struct Patience {
    since: Option<Instant>,
    attempt: u32,
    backoff: Backoff,
}

impl Patience {
    pub(super) fn new(limit: Duration) -> Self {
        let backoff = Backoff {
            first: Duration::from_millis(5),
            max: Duration::from_millis(200),
            max_elapsed: limit,
            ..Backoff::default()
        };
        Self { since: None, attempt: 0, backoff }
    }

    /// The time that is left; it begins to run with the first trouble.
    pub(super) fn left(&mut self) -> Duration {
        let since = *self.since.get_or_insert_with(Instant::now);
        self.backoff.max_elapsed.saturating_sub(since.elapsed())
    }

    /// Waits before the next attempt. False when there is no time for one.
    pub(super) async fn pause(&mut self) -> bool {
        let elapsed = self.backoff.max_elapsed.saturating_sub(self.left());
        let Some(delay) = self.backoff.delay(self.attempt, fastrand::f64(), elapsed) else {
            return false;
        };
        self.attempt += 1;
        sleep(delay).await;
        true
    }
}

/// When the next attempt to connect may begin: later after each that failed, however many callers
/// there are, and however soon they give up.
///
/// The longest delay is a quarter of what a call bears with, so that a server which has come back
/// is found by every call that begins then.
pub(super) struct Pace {
    backoff: Backoff,
    not_before: Instant,
    attempt: u32,
}

impl Pace {
    pub(super) fn new(patience: Duration) -> Self {
        let (first, longest) = (Duration::from_millis(10), Duration::from_millis(500));
        let max = (patience / 4).clamp(first, longest);
        let backoff = Backoff { first, max, max_elapsed: Duration::MAX, ..Backoff::default() };
        Self { backoff, not_before: Instant::now(), attempt: 0 }
    }

    /// Waits until the next attempt may begin, which counts though it is dropped.
    ///
    /// `served` says that the connection before it has answered somebody: one that was opened and
    /// is of no use is no success.
    pub(super) async fn next(&mut self, served: bool) {
        if served {
            self.attempt = 0;
        }
        sleep_until(self.not_before).await;
        let delay = self.backoff.delay(self.attempt, fastrand::f64(), Duration::ZERO);
        self.not_before = Instant::now() + delay.unwrap_or(self.backoff.max);
        self.attempt = self.attempt.saturating_add(1);
        tracing::debug!(attempt = self.attempt, "connecting to Redis");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many attempts begin within the time, if each takes none.
    async fn attempts(within: Duration, served: bool) -> usize {
        let mut pace = Pace::new(Duration::from_secs(1));
        let begun = Instant::now();
        let mut attempts = 0;
        while begun.elapsed() < within {
            pace.next(served).await;
            attempts += 1;
        }
        attempts
    }

    #[tokio::test(start_paused = true)]
    async fn attempts_that_fail_become_rare() {
        let first = attempts(Duration::from_secs(1), false).await;
        assert!((5..=16).contains(&first), "{first}");
        let minute = attempts(Duration::from_secs(60), false).await;
        assert!(minute <= 60 * 8 + 16, "{minute}");
        assert!(attempts(Duration::from_secs(1), true).await <= 200);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_served_is_replaced_at_once() {
        let mut pace = Pace::new(Duration::from_secs(1));
        for _ in 0..10 {
            pace.next(false).await;
        }
        sleep(Duration::from_secs(1)).await;
        let begun = Instant::now();
        pace.next(true).await;
        pace.next(false).await;
        assert!(begun.elapsed() <= Duration::from_millis(11), "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_delay_is_never_longer_than_a_quarter_of_the_patience() {
        for patience in [100, 400, 60_000].map(Duration::from_millis) {
            let mut pace = Pace::new(patience);
            for _ in 0..20 {
                let begun = Instant::now();
                pace.next(false).await;
                let longest = (patience / 4).min(Duration::from_millis(500));
                assert!(begun.elapsed() <= longest + Duration::from_millis(2));
            }
        }
    }
}
