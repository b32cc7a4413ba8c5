//! Tests against the public API, with real servers where one is needed.
//!
//! They share one binary, so that the crate is linked once. Each module is about one part.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    unreachable_pub,
    reason = "a test panics to fail, and nobody imports it"
)]

mod cancel;
mod locks;
#[cfg(feature = "metrics")]
mod metrics;
#[cfg(all(feature = "redis", feature = "postgres"))]
mod processes;
#[cfg(feature = "redis")]
mod redis_asks;
#[cfg(feature = "redis")]
mod redis_locks;
mod servers;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod store_fences;
#[cfg(feature = "sqlite")]
mod store_sqlite;
mod support;
#[cfg(feature = "sqlite")]
mod transactions;
