//! When a lease is renewed, and when again after a failure.

use std::time::Duration;

use crate::types::Lease;

/// The renewal plan of a lease: a third of it while all is well, faster after failures.
///
/// A failed attempt is repeated after a quarter of what is left, at least 5 ms and at most one
/// third of the lease, so that a lease of any length gets about ten attempts before it is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewals {
    lease: Lease,
}

impl Renewals {
    /// The plan for `lease`.
    #[must_use]
    pub fn new(lease: Lease) -> Self {
        Self { lease }
    }

    /// How long after a successful renewal was sent the next one is due.
    #[must_use]
    pub fn after_success(self) -> Duration {
        self.lease.get() / 3
    }

    /// How long after a failure the next attempt is due, with `remaining` of the lease left.
    #[must_use]
    pub fn after_failure(self, remaining: Duration) -> Duration {
        (remaining / 4)
            .clamp(Duration::from_millis(5), self.after_success().max(Duration::from_millis(5)))
    }

    /// How long one attempt may take: half of what is left, so that another one fits.
    #[must_use]
    pub fn attempt(self, remaining: Duration) -> Duration {
        (remaining / 2).max(Duration::from_millis(5))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_renewal_is_tried_many_times_before_the_lease_is_lost() {
        let lease = Lease::new(Duration::from_secs(30)).unwrap();
        let plan = Renewals::new(lease);
        let mut remaining = lease.get() - plan.after_success();
        let mut attempts = 0;
        while remaining > Duration::from_millis(5) {
            remaining = remaining.saturating_sub(plan.after_failure(remaining));
            attempts += 1;
        }
        assert!(attempts >= 10, "{attempts}");
    }
}
