#![forbid(unsafe_code)]
//! Transactions over fenced locks.

pub mod backend;
mod error;
pub mod protocol;
mod types;

pub use error::{Error, ErrorKind, Result, RetryAdvice};
pub use protocol::Backoff;
pub use types::*;
