//! Tests against the public API, with real servers where one is needed.
//!
//! They share one binary, so that the crate is linked once. Each module is about one part.
// The lints that keep panics out of the library would only bend the tests: a test panics to fail.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod cancel;
mod locks;
mod redis_asks;
mod redis_commands;
mod redis_corrupt;
mod redis_differential;
mod redis_locks;
mod servers;
mod support;
