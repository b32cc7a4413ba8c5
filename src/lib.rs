#![forbid(unsafe_code)]
#![warn(missing_docs)]
#![warn(
    clippy::as_conversions,
    clippy::dbg_macro,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::todo,
    clippy::unimplemented,
    clippy::unreachable,
    clippy::unwrap_used
)]
//! Transactions over fenced locks: lock what you change, check the token in the store, commit once.
//!
//! ```
//! # #[cfg(feature = "sqlite")]
//! # fn main() -> Result<(), palisade::Error> {
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! use palisade::{Coordinator, Error, SqlStore};
//! use sqlx::sqlite::SqlitePoolOptions;
//!
//! let pool = SqlitePoolOptions::new().max_connections(1).connect("sqlite::memory:").await?;
//! sqlx::raw_sql("CREATE TABLE stock (item TEXT, pieces INT); INSERT INTO stock VALUES ('pen', 9)")
//!     .execute(&pool)
//!     .await?;
//! let shop = SqlStore::new("shop", pool);
//! shop.migrate().await?;
//! let locks = palisade::connect("memory:").await?;
//! let coordinator = Coordinator::builder(locks).store(&shop).build();
//!
//! let tx = coordinator.transaction(["stock:pen"]).begin().await?;
//! let db = tx.enlist(&shop).await?;
//! sqlx::query("UPDATE stock SET pieces = pieces - 1 WHERE item = 'pen'").execute(&db).await?;
//! tx.commit().await?;
//! # Ok(()) })
//! # }
//! # #[cfg(not(feature = "sqlite"))]
//! # fn main() {}
//! ```
//!
//! - [`Locks`]: locks on their own. [`connect`] makes one from a URL.
//! - [`Coordinator`]: transactions. [`Coordinator::run`] is the usual way in.
//! - `SqlStore` and `Branch`: databases, and statements behind the fence (features `sqlite`,
//!   `postgres`).
//! - [`Error`]: one error type; [`Error::retry_advice`] says what may be tried again.
//! - [`docs`]: how it works, what it promises, what it measures.
//!
//! # Features
//!
//! `redis` (default), `redis-tls` (`rediss:` URLs), `sqlite`, `postgres`, `metrics`, and `testing`:
//! known bugs to plant in a driver, so that a test of one's own can show that it would find them. A
//! feature adds API and never changes behaviour.

pub mod backend;
mod connect;
mod error;
mod lock;
pub mod protocol;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod sql;
pub mod store;
#[cfg(feature = "testing")]
pub mod testing;
mod transaction;
mod types;

pub use connect::{connect, connect_with};
pub use error::{Error, ErrorKind, Result, RetryAdvice};
pub use lock::{
    LocalHandOver, LockGuard, LockHealth, LockInfo, LockOptions, LockRequest, Locked, LockedKey,
    Locks, Statistics,
};
pub use protocol::{Backoff, BreakerOptions, BreakerState};
pub use store::StoreHealth;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub use store::{Branch, SqlDatabase, SqlStore};
pub use transaction::{
    Coordinator, CoordinatorBuilder, Fallback, Handler, Health, Nested, Outage, Transaction,
    TransactionRequest, Tx,
};
pub use types::*;

/// How it works, what it promises, and what it measures.
pub mod docs {
    #[doc = include_str!("docs/architecture.md")]
    pub mod architecture {}
    #[doc = include_str!("docs/guarantees.md")]
    pub mod guarantees {}
    #[doc = include_str!("docs/metrics.md")]
    pub mod metrics {}
}

/// The program in the README is compiled and run with the documentation tests.
#[cfg(all(doctest, feature = "sqlite"))]
#[doc = include_str!("../README.md")]
struct Readme;
