//! The memory service behind a network, with a bug in between.
//!
//! The service is [`palisade::protocol::Queue`] behind a mutex and has no text to edit. So the bug
//! is in front of it: a call is forwarded as somebody else's.

use std::sync::atomic::{AtomicBool, Ordering};

use palisade::backend::{Capabilities, LockBackend, MemoryBackend, Sink};
use palisade::protocol::{Acquire, Acquired, Holder, Inspection, Part, Released, Renewal, Renewed};
use palisade::{ClientId, Partition, RequestId, ResourceKey, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    ReleaseWithoutOwner,
    RenewWithoutOwner,
    NoRequestId,
}

#[derive(Debug)]
pub struct Network {
    pub service: MemoryBackend,
    bug: Option<Bug>,
    loses_reply: AtomicBool,
}

impl Network {
    pub fn new(bug: Option<Bug>) -> Self {
        Self { service: MemoryBackend::new(), bug, loses_reply: AtomicBool::new(false) }
    }

    /// The reply to the next acquire is lost, and the request is sent again.
    pub fn lose_reply(&self) {
        self.loses_reply.store(true, Ordering::SeqCst);
    }

    pub fn has_lost_reply(&self) -> bool {
        !self.loses_reply.load(Ordering::SeqCst)
    }

    /// The request as a holder's who satisfies `whose`, if there is one.
    async fn of_holder(&self, part: &Part, whose: impl Fn(&Holder) -> bool) -> Result<Part> {
        let seen = self.service.inspect(part.partition, &part.wants[0].key).await?;
        Ok(match seen.holders.into_iter().find(whose) {
            Some(Holder { owner, request, .. }) => Part { owner, request, ..part.clone() },
            None => part.clone(),
        })
    }

    async fn deliver(&self, ask: &Acquire) -> Result<Acquired> {
        let mut ask = ask.clone();
        if self.bug == Some(Bug::NoRequestId) {
            ask.part.request = RequestId::next();
        }
        self.service.acquire(&ask).await
    }
}

#[async_trait::async_trait]
impl LockBackend for Network {
    fn capabilities(&self) -> Capabilities {
        self.service.capabilities()
    }

    async fn subscribe(&self, client: ClientId, sink: Sink) -> Result<()> {
        self.service.subscribe(client, sink).await
    }

    fn unsubscribe(&self, client: ClientId) {
        self.service.unsubscribe(client);
    }

    async fn acquire(&self, ask: &Acquire) -> Result<Acquired> {
        if self.loses_reply.swap(false, Ordering::SeqCst) {
            self.deliver(ask).await?;
        }
        self.deliver(ask).await
    }

    async fn renew(&self, partition: Partition, renewals: &[Renewal]) -> Result<Vec<Renewed>> {
        let mut renewals = renewals.to_vec();
        for renewal in &mut renewals {
            if self.bug == Some(Bug::RenewWithoutOwner) {
                renewal.part = self.of_holder(&renewal.part, |_| true).await?;
            }
        }
        self.service.renew(partition, &renewals).await
    }

    async fn release(&self, part: &Part) -> Result<Released> {
        let part = match self.bug {
            Some(Bug::ReleaseWithoutOwner) => self.of_holder(part, |_| true).await?,
            Some(Bug::NoRequestId) => self.of_holder(part, |it| it.owner == part.owner).await?,
            _ => part.clone(),
        };
        self.service.release(&part).await
    }

    async fn cancel(&self, part: &Part) -> Result<()> {
        self.service.cancel(part).await
    }

    async fn inspect(&self, partition: Partition, key: &ResourceKey) -> Result<Inspection> {
        self.service.inspect(partition, key).await
    }

    async fn ping(&self) -> Result<()> {
        self.service.ping().await
    }
}
