//! A lock service in memory that can fail, hang, and be counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use async_trait::async_trait;
use palisade::backend::{Capabilities, LockBackend, MemoryBackend, Sink};
use palisade::protocol::{Acquire, Acquired, Inspection, Part, Released, Renewal, Renewed};
use palisade::{ClientId, Error, ErrorKind, LockOptions, Locks, Partition, ResourceKey, Result};
use tokio::sync::watch;

/// How a call ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    Answers,
    /// An error, at once.
    Fails,
    /// Nothing comes back until the mood changes.
    Hangs,
    /// Locks are refused as if memory were full. All else is answered.
    Full,
}

#[derive(Debug)]
pub struct Shaky {
    inner: MemoryBackend,
    mood: watch::Sender<Mood>,
    pub acquires: AtomicU32,
    pub pings: AtomicU32,
}

impl Shaky {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            inner: MemoryBackend::new(),
            mood: watch::Sender::new(Mood::Answers),
            acquires: AtomicU32::new(0),
            pings: AtomicU32::new(0),
        })
    }

    /// Over it, with these options.
    pub async fn locks(self: &Arc<Self>, options: LockOptions) -> Locks {
        Locks::with_options(Arc::clone(self) as _, options).await.unwrap()
    }

    pub fn set(&self, mood: Mood) {
        self.mood.send_replace(mood);
    }

    async fn through(&self, asks: bool) -> Result<&MemoryBackend> {
        let mut mood = self.mood.subscribe();
        let mood = *mood.wait_for(|mood| *mood != Mood::Hangs).await.unwrap();
        match mood {
            Mood::Fails => Err(Error::new(ErrorKind::Unavailable, "test", "it is down")),
            Mood::Full if asks => Err(Error::new(ErrorKind::Unavailable, "test", "it is full")),
            _ => Ok(&self.inner),
        }
    }
}

#[async_trait]
impl LockBackend for Shaky {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    async fn subscribe(&self, client: ClientId, sink: Sink) -> Result<()> {
        self.inner.subscribe(client, sink).await
    }
    fn unsubscribe(&self, client: ClientId) {
        self.inner.unsubscribe(client);
    }
    async fn acquire(&self, ask: &Acquire) -> Result<Acquired> {
        self.acquires.fetch_add(1, SeqCst);
        self.through(true).await?.acquire(ask).await
    }
    async fn renew(&self, partition: Partition, renewals: &[Renewal]) -> Result<Vec<Renewed>> {
        self.through(false).await?.renew(partition, renewals).await
    }
    async fn release(&self, part: &Part) -> Result<Released> {
        self.through(false).await?.release(part).await
    }
    async fn cancel(&self, part: &Part) -> Result<()> {
        self.through(false).await?.cancel(part).await
    }
    async fn inspect(&self, partition: Partition, key: &ResourceKey) -> Result<Inspection> {
        self.through(false).await?.inspect(partition, key).await
    }
    async fn ping(&self) -> Result<()> {
        self.pings.fetch_add(1, SeqCst);
        self.through(false).await.map(drop)
    }
}
