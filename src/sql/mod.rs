//! What every user of an SQL database shares: error classes, statements, migrations.
//!
//! Statements of any length are files beside this module, each with a header that says what it
//! takes, what it returns, and why it is written that way.

mod classify;
mod migrations;
#[cfg(feature = "postgres")]
pub(crate) mod postgres;
#[cfg(feature = "sqlite")]
pub(crate) mod sqlite;

#[cfg(feature = "sqlite")]
pub(crate) use classify::kind_of;
pub(crate) use classify::{Failed, classify, is_benign, refuse};
#[cfg(feature = "postgres")]
pub(crate) use classify::{lost_reply, sqlstate};
pub(crate) use migrations::{File, migrate};

/// The most rows that one round of a purge deletes in one statement.
pub(crate) const PURGE_BATCH: u32 = 5_000;

/// How long a fence statement may run at a server, whatever the store's own time-out.
///
/// It bounds how long a fence may still work on a snapshot without the newest watermark.
#[cfg(feature = "postgres")]
pub(crate) const FENCE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(5);

/// How long after the watermark was moved the rows below it are deleted: twice the longest time
/// that a fence statement may run.
///
/// A constant and no setting, because every process that shares the database must agree on it.
pub(crate) const PURGE_GRACE: std::time::Duration = std::time::Duration::from_secs(10);
