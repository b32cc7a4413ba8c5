//! How a lock service stands, as this process sees it.

use std::time::Duration;

use serde::Serialize;

use crate::protocol::BreakerState;
use crate::types::{Status, as_seconds};

/// What is known of a lock service without asking it: see [`Locks::health`](crate::Locks::health).
///
/// Serialized, times are in seconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LockHealth {
    /// `Down` while requests are refused: the breaker is open, or the service was shut down.
    /// `Degraded` after a failure that is not past yet, and when the watchdog is late.
    pub status: Status,
    /// Why it is not `Up`.
    pub reason: Option<String>,
    /// Whether requests for locks are sent.
    pub breaker: BreakerState,
    /// How long the last answer took.
    #[serde(serialize_with = "as_seconds")]
    pub last_latency: Option<Duration>,
    /// How long answers take: a mean in which the last eight have most of the weight.
    #[serde(serialize_with = "as_seconds")]
    pub latency: Option<Duration>,
    /// How far the clock of the service is ahead of this one in µs, as the last probe found it,
    /// give or take half of its round trip. `None` before the first probe and where the service has
    /// no clock of its own.
    pub clock_skew_us: Option<i64>,
    /// How long ago the last probe was answered.
    #[serde(serialize_with = "as_seconds")]
    pub probed: Option<Duration>,
    /// How late the watchdog was when it last looked after the leases; or is now, if that is more.
    #[serde(serialize_with = "as_seconds")]
    pub watchdog_lag: Option<Duration>,
}
