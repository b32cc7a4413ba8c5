//! A lock service that can be put out of reach.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use palisade::backend::{Capabilities, LockBackend, MemoryBackend, Sink};
use palisade::protocol::{Acquire, Acquired, Inspection, Part, Released, Renewal, Renewed};
use palisade::{ClientId, Error, ErrorKind, Partition, ResourceKey, Result};

/// Locks in memory, out of reach while it is cut off: every call then fails at once, and does
/// nothing.
#[derive(Debug)]
pub struct Cuttable {
    inner: Arc<MemoryBackend>,
    cut: AtomicBool,
}

impl Cuttable {
    /// In front of `inner`, which others may reach.
    pub fn new(inner: Arc<MemoryBackend>) -> Arc<Self> {
        Arc::new(Self { inner, cut: AtomicBool::new(false) })
    }

    pub fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::SeqCst);
    }

    fn check(&self) -> Result<()> {
        if !self.cut.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unavailable, "call", "it is cut off"))
    }
}

#[async_trait::async_trait]
impl LockBackend for Cuttable {
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
        self.check()?;
        self.inner.acquire(ask).await
    }

    async fn renew(&self, partition: Partition, renewals: &[Renewal]) -> Result<Vec<Renewed>> {
        self.check()?;
        self.inner.renew(partition, renewals).await
    }

    async fn release(&self, part: &Part) -> Result<Released> {
        self.check()?;
        self.inner.release(part).await
    }

    async fn cancel(&self, part: &Part) -> Result<()> {
        self.check()?;
        self.inner.cancel(part).await
    }

    async fn inspect(&self, partition: Partition, key: &ResourceKey) -> Result<Inspection> {
        self.check()?;
        self.inner.inspect(partition, key).await
    }

    async fn ping(&self) -> Result<()> {
        self.check()
    }
}
