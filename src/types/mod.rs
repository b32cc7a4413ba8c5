//! The words of the library as types: what is locked, by whom, how, until when.

mod id;
mod key;
mod lease;
mod status;
mod token;

pub(crate) use id::IdMap;
pub use id::{ClientId, OwnerId, RequestId};
pub use key::{InvalidKey, MAX_KEY_BYTES, MAX_KEYS, Mode, Partition, ResourceKey, Want};
pub use lease::{InvalidLease, Lease, LeaseState, MAX_LEASE, MAX_WAIT, MIN_LEASE};
pub use status::Status;
pub(crate) use status::as_seconds;
pub use token::{FencingToken, InvalidToken, MAX_AHEAD};
