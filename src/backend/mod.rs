//! The seam to a lock service: five operations, one trait, one driver per service.
//!
//! A driver carries out what [`protocol::Queue`](crate::protocol::Queue) decides; it adds no rule
//! of its own. What a service cannot do is a value, [`Capabilities`], never a surprise.

mod memory;
#[cfg(feature = "redis")]
mod redis;

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;

use crate::error::Result;
use crate::protocol::{
    Acquire, Acquired, Followed, HandOver, Inspection, Part, Released, Renewal, Renewed,
};
use crate::types::{ClientId, Partition, ResourceKey};

pub use memory::MemoryBackend;
#[cfg(feature = "redis")]
pub use redis::{ClientCertificate, MinReplicas, RedisBackend, RedisOptions, TlsOptions};

/// What a lock service can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// How many partitions the keys are spread over.
    pub partitions: u16,
    /// Whether a grant that was waited for is pushed; if not, the refresh finds it. And whether a
    /// request is told that it is followed.
    pub pushes: bool,
}

impl Capabilities {
    /// One partition, with pushes.
    #[must_use]
    pub fn new(partitions: u16, pushes: bool) -> Self {
        Self { partitions, pushes }
    }
}

/// What a service says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Probe {
    /// Its clock in µs since 1970, if it has one of its own.
    pub clock_us: Option<u64>,
}

impl Probe {
    /// A service with that clock.
    #[must_use]
    pub fn new(clock_us: Option<u64>) -> Self {
        Self { clock_us }
    }
}

/// What a service tells a client without being asked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Push {
    /// A request that stood in line was granted.
    HandOver(HandOver),
    /// Somebody stands in line directly behind a request.
    Followed(Followed),
}

/// Where pushes go. It must not block.
pub type Sink = Arc<dyn Fn(Push) + Send + Sync>;

/// A lock service.
///
/// Every call is one atomic step at the service and may be sent twice. A call that fails with
/// [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable) may have happened, or may still
/// happen: the caller settles it by sending it again or by [`cancel`](LockBackend::cancel). No call
/// has a time-out of its own; callers drop the future at their deadline, which leaves the same
/// doubt.
#[async_trait]
pub trait LockBackend: fmt::Debug + Send + Sync + 'static {
    /// What the service can do.
    fn capabilities(&self) -> Capabilities;

    /// What is pushed to `client` goes to `sink` from now on.
    ///
    /// To ensure correctness:
    /// - a push may be lost and may be repeated, but must never tell of a grant that was not made;
    /// - whenever a request is told that it stands in line, the requests directly before it are
    ///   told that they are followed, in the same step;
    /// - it must be possible before the answer `Queued` has arrived.
    async fn subscribe(&self, client: ClientId, sink: Sink) -> Result<()>;

    /// `client` is gone: nothing is pushed to it any more.
    fn unsubscribe(&self, client: ClientId);

    /// Asks for all keys of a set.
    ///
    /// To ensure correctness:
    /// - all keys are granted in one step, or nothing changes but the line;
    /// - the same `(owner, request)` again answers the same while it is held or queued, and adds
    ///   nothing; only how many tokens were reserved may be forgotten;
    /// - tokens that were reserved are never given out again;
    /// - a request that was cancelled is not granted for [`TOMBSTONE`](crate::protocol::TOMBSTONE).
    async fn acquire(&self, ask: &Acquire) -> Result<Acquired>;

    /// Keeps requests of one partition alive, answering each for itself, in order.
    ///
    /// To ensure correctness:
    /// - a deadline never moves back;
    /// - a request that lost one of its keys is `Lost`, and what was left of it is gone;
    /// - a waiter whose way is free is granted in this very call.
    async fn renew(&self, partition: Partition, renewals: &[Renewal]) -> Result<Vec<Renewed>>;

    /// Gives up a grant.
    ///
    /// To ensure correctness:
    /// - only entries of this `(owner, request)` go;
    /// - those who wait are promoted in the same step, and their grants pushed;
    /// - `Gone` is not said where an earlier copy of this call may have done it.
    async fn release(&self, part: &Part) -> Result<Released>;

    /// Ends a request whatever became of it: not arrived yet, queued, granted, released.
    ///
    /// To ensure correctness: as [`release`](LockBackend::release), and a copy of the request that
    /// arrives later is not granted.
    async fn cancel(&self, part: &Part) -> Result<()>;

    /// Shows who holds a key and who waits for it. Changes nothing.
    async fn inspect(&self, partition: Partition, key: &ResourceKey) -> Result<Inspection>;

    /// Checks that the service answers and is usable.
    async fn ping(&self) -> Result<()>;

    /// As [`ping`](LockBackend::ping), and shows the clock of the service. It is how a service is
    /// asked whether it is back, so it should cost little.
    async fn probe(&self) -> Result<Probe> {
        self.ping().await.map(|()| Probe::default())
    }
}
