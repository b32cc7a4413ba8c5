//! Lock services with a known bug, which the checker must find.

use std::sync::Arc;

use async_trait::async_trait;
use palisade::backend::{Capabilities, LockBackend, MemoryBackend, Push, Sink};
use palisade::protocol::{
    Acquire, Acquired, Grant, HandOver, Inspection, Part, Released, Renewal, Renewed,
};
use palisade::{ClientId, FencingToken, Partition, ResourceKey, Result};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// The control.
    None,
    /// Who releases or cancels releases whoever holds the key.
    ReleaseWithoutOwner,
    /// Tokens are taken from a clock that ticks too slowly.
    SameTokenTwice,
    /// A release gives up all entries of its owner.
    EntriesNotCounted,
}

#[derive(Debug)]
pub struct Broken {
    inner: MemoryBackend,
    bug: Bug,
}

impl Broken {
    pub fn new(bug: Bug) -> Self {
        Self { inner: MemoryBackend::new(), bug }
    }

    fn grant(bug: Bug, mut grant: Grant) -> Grant {
        if bug == Bug::SameTokenTwice {
            const TICK_US: u64 = 20_000;
            let coarse =
                |token: &FencingToken| FencingToken::new(token.get() / TICK_US * TICK_US).unwrap();
            grant.tokens = grant.tokens.iter().map(coarse).collect();
        }
        grant
    }

    /// Releases those whom the bug mistakes for the one who asked.
    async fn release_others(&self, part: &Part) -> Result<()> {
        let seen = self.inspect(part.partition, &part.wants[0].key).await?;
        for holder in seen.holders {
            let taken = match self.bug {
                Bug::ReleaseWithoutOwner => true,
                Bug::EntriesNotCounted => holder.owner == part.owner,
                Bug::None | Bug::SameTokenTwice => false,
            };
            if taken {
                let (owner, request) = (holder.owner, holder.request);
                self.inner.release(&Part { owner, request, ..part.clone() }).await?;
            }
        }
        Ok(())
    }
}

#[async_trait]
impl LockBackend for Broken {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn subscribe(&self, client: ClientId, sink: Sink) -> Result<()> {
        let bug = self.bug;
        let sink: Sink = Arc::new(move |push| match push {
            Push::HandOver(over) => {
                sink(Push::HandOver(HandOver { grant: Self::grant(bug, over.grant), ..over }));
            }
            other => sink(other),
        });
        self.inner.subscribe(client, sink).await
    }

    fn unsubscribe(&self, client: ClientId) {
        self.inner.unsubscribe(client);
    }

    async fn acquire(&self, ask: &Acquire) -> Result<Acquired> {
        Ok(match self.inner.acquire(ask).await? {
            Acquired::Granted(grant) => Acquired::Granted(Self::grant(self.bug, grant)),
            other => other,
        })
    }

    async fn renew(&self, partition: Partition, renewals: &[Renewal]) -> Result<Vec<Renewed>> {
        let renewed = self.inner.renew(partition, renewals).await?;
        let held = |renewed| match renewed {
            Renewed::Held(Some(grant)) => Renewed::Held(Some(Self::grant(self.bug, grant))),
            other => other,
        };
        Ok(renewed.into_iter().map(held).collect())
    }

    async fn release(&self, part: &Part) -> Result<Released> {
        let released = self.inner.release(part).await?;
        self.release_others(part).await?;
        Ok(released)
    }

    async fn cancel(&self, part: &Part) -> Result<()> {
        self.inner.cancel(part).await?;
        self.release_others(part).await
    }

    async fn inspect(&self, partition: Partition, key: &ResourceKey) -> Result<Inspection> {
        let mut seen = self.inner.inspect(partition, key).await?;
        for holder in &mut seen.holders {
            let grant = Grant { request: holder.request, tokens: vec![holder.token], block: 1 };
            holder.token = Self::grant(self.bug, grant).tokens[0];
        }
        Ok(seen)
    }

    async fn ping(&self) -> Result<()> {
        self.inner.ping().await
    }
}
