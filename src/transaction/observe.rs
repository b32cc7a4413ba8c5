//! Outcomes of transactions through the `metrics` facade; the names are in `src/docs/metrics.md`.

use super::fallback::Ground;

/// How a transaction ended, as a label.
#[derive(Clone, Copy)]
pub(super) enum End {
    Committed,
    RolledBack,
    InDoubt,
    Degraded,
}

#[cfg(feature = "metrics")]
pub(super) fn ended(end: End) {
    let outcome = match end {
        End::Committed => "committed",
        End::RolledBack => "rolled_back",
        End::InDoubt => "in_doubt",
        End::Degraded => "degraded",
    };
    metrics::counter!("palisade_transactions_total", "outcome" => outcome).increment(1);
}

#[cfg(not(feature = "metrics"))]
pub(super) fn ended(_end: End) {}

/// A transaction has begun without the lock service.
#[cfg(feature = "metrics")]
pub(super) fn degraded(ground: Ground) {
    let fallback = match ground {
        Ground::Locks => return,
        Ground::OtherLocks => "backend",
        Ground::Rows => "store_fence",
        Ground::Nothing => "handler",
    };
    metrics::counter!("palisade_transactions_degraded_total", "fallback" => fallback).increment(1);
}

#[cfg(not(feature = "metrics"))]
pub(super) fn degraded(_ground: Ground) {}
