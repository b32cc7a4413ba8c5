//! The seam to the stores: a branch of a transaction in one database, behind its fence.
//!
//! A branch is handed out only after the fence rows of all its keys were changed in its
//! transaction, so that no statement can come before the check: by type, not by advice.
//!
//! [`SqlStore`] is the store of a database that sqlx speaks to, and [`Branch`] the handle that runs
//! statements in one. What differs between databases is in one driver file each; drivers never see
//! each other.

#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod branch;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod core;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod database;
mod health;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod progress;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod session;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod sql_store;
#[cfg(feature = "sqlite")]
mod sqlite;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod verdict;

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::time::Instant;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::types::{FencingToken, Lease, LeaseState, Mode, OwnerId, ResourceKey};

#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub use branch::Branch;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub use database::SqlDatabase;
pub use health::StoreHealth;
#[cfg(feature = "postgres")]
pub use postgres::Isolation;
#[cfg(any(feature = "sqlite", feature = "postgres"))]
pub use sql_store::{Purged, SqlStore};

/// One key as a transaction holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// What.
    pub key: ResourceKey,
    /// How.
    pub mode: Mode,
    /// With which token.
    pub token: FencingToken,
}

/// Who issues the tokens of a fence.
// exhaustive: there is a lock service, or there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Issuer {
    /// The lock service has, with the locks.
    LockService,
    /// The store does, when it takes the fence rows: they are the only locks then.
    Store,
}

/// What a transaction attempt shows to a store before its first statement.
#[derive(Clone, Debug)]
pub struct Fence {
    /// The attempt: a UUID of its own for every begin. It is stamped on what is written.
    pub attempt: Uuid,
    /// Who holds the keys.
    pub owner: OwnerId,
    /// The keys, sorted, each once, with the strongest mode. Where the store issues the token, the
    /// tokens here are only what it has to exceed.
    pub held: Vec<Held>,
    /// Where the tokens come from.
    pub issuer: Issuer,
    /// The time-outs of the session follow from it.
    pub lease: Lease,
    /// Refuses every statement once it is lost.
    pub state: Arc<LeaseState>,
    /// Until when the fence may wait for rows that another branch has changed.
    pub deadline: Instant,
}

impl Fence {
    /// Whether a key is held exclusively.
    pub(crate) fn writes(&self) -> bool {
        self.held.iter().any(|held| held.mode == Mode::Exclusive)
    }
}

/// How a branch ended.
// exhaustive: the three values of the truth.
#[derive(Debug)]
#[must_use]
pub enum Outcome {
    /// Everything the branch did is durable.
    Committed,
    /// Nothing of it is there, for this reason.
    RolledBack(Error),
    /// It is not known which.
    InDoubt(Error),
}

/// A database that takes part in transactions.
#[async_trait]
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// The name that the program gave it.
    fn name(&self) -> &str;

    /// The UUID that the migration gave to the database. It orders stores, and finds out when one
    /// database goes by two names.
    async fn id(&self) -> Result<Uuid>;

    /// Opens a branch that may write: begins, fences, and only then returns.
    ///
    /// A future that is dropped leaves no open transaction in the pool.
    async fn open(&self, fence: &Fence) -> Result<Arc<dyn AnyBranch>>;

    /// Opens a branch that reads one snapshot in which nothing is newer than the caller's tokens.
    ///
    /// Where the store issues the token, the branch keeps the rows until it ends, as one that
    /// writes does: nothing else would keep others from the keys.
    async fn open_read(&self, fence: &Fence) -> Result<Arc<dyn AnyBranch>>;

    /// How it stands, from what is known in this process. Does no I/O.
    fn health(&self) -> StoreHealth {
        StoreHealth::new(self.name())
    }
}

/// A branch of a transaction, whatever its database.
///
/// The connection is owned by the branch until it has ended in a way that is proven; otherwise the
/// connection is closed and never returns to its pool.
#[async_trait]
pub trait AnyBranch: fmt::Debug + Send + Sync + 'static {
    /// Whether the branch was opened by [`Store::open_read`].
    fn is_read_only(&self) -> bool;

    /// The token that the store issued last, where it issues them.
    fn issued(&self) -> Option<FencingToken>;

    /// The first failure of a statement outside a savepoint, or a statement that was cancelled. A
    /// branch with a failure can only roll back.
    fn failure(&self) -> Option<Error>;

    /// Fences further keys in the open transaction. Only where later statements see what was
    /// committed meanwhile (READ COMMITTED, or a store with one writer); elsewhere it fails with
    /// [`ErrorKind::WouldDeadlock`](crate::ErrorKind::WouldDeadlock) so that the work starts over.
    async fn extend(&self, held: &[Held]) -> Result<()>;

    /// Starts a savepoint; `depth` counts from 1.
    async fn savepoint(&self, depth: u32) -> Result<()>;

    /// Keeps what was done since the savepoint.
    async fn release_savepoint(&self, depth: u32) -> Result<()>;

    /// Undoes what was done since the savepoint, and clears a failure within it.
    async fn rollback_to_savepoint(&self, depth: u32) -> Result<()>;

    /// Marks that the savepoint must be rolled back before anything else is done. Does no I/O.
    fn abandon_savepoint(&self, depth: u32);

    /// Proves that this is still the same, healthy transaction, and commits. When the reply is lost
    /// it finds out what became of the commit.
    async fn commit(&self) -> Outcome;

    /// Rolls back; the connection returns to its pool only when that was acknowledged.
    async fn rollback(&self) -> Result<()>;

    /// Refuses every further statement. Does no I/O; [`rollback`](AnyBranch::rollback) may follow.
    fn close(&self);

    /// Keeps an idle session alive. Does nothing when a statement is running.
    async fn ping(&self) -> Result<()>;

    /// For the typed handle.
    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync>;
}
