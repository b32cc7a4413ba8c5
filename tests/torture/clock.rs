//! The clock of histories: monotonic, and the same for all processes of the machine.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since some moment before the first process.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A span on this clock.
pub fn nanos(span: Duration) -> u64 {
    span.as_nanos() as u64
}
