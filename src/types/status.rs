//! How a part of the whole stands.

use std::time::Duration;

use serde::{Serialize, Serializer};

/// How a part stands; the greater, the worse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Status {
    /// It works.
    Up,
    /// It works, and something is not as it should be; or it has just begun to work again.
    Degraded,
    /// It is not used: it has failed, or was closed.
    Down,
}

/// Writes a time as seconds, the unit of the metrics.
pub(crate) fn as_seconds<S: Serializer>(time: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
    time.map(|time| time.as_secs_f64()).serialize(to)
}
