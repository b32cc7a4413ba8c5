#![forbid(unsafe_code)]
//! Transactions over fenced locks.

pub mod backend;
mod connect;
mod error;
mod lock;
pub mod protocol;
pub mod store;
mod transaction;
mod types;

pub use connect::{connect, connect_with};
pub use error::{Error, ErrorKind, Result, RetryAdvice};
pub use lock::{
    LockGuard, LockInfo, LockOptions, LockRequest, Locked, LockedKey, Locks, Statistics,
};
pub use protocol::Backoff;
pub use transaction::{
    Coordinator, CoordinatorBuilder, Fallback, Handler, Nested, Outage, Transaction,
    TransactionRequest, Tx,
};
pub use types::*;
