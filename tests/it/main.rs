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

mod breaker;
mod cancel;
mod degraded;
mod degraded_floors;
mod examples;
mod fault_matrix;
mod hazards;
mod health;
mod histories;
mod local_hand_over;
mod locks;
mod locks_on_redis;
mod metrics;
#[path = "../torture/planted/mod.rs"]
mod planted;
mod planted_bugs;
mod processes;
mod proxy_faults;
mod redis_asks;
mod redis_clock;
mod redis_commands;
mod redis_corrupt;
mod redis_differential;
mod redis_locks;
mod redis_memory;
mod redis_outage;
mod redis_reconnect;
mod redis_replicas;
mod redis_states;
mod redis_tls;
mod redis_together;
mod redis_users;
mod servers;
mod shaky;
mod store_fence_rows;
mod store_fences;
mod store_postgres;
mod store_postgres_facts;
mod store_postgres_prepared;
mod store_sqlite;
mod support;
mod transactions;
mod transactions_on_postgres;
mod two_crowds;
