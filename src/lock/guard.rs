//! What a holder has in hand.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::Result;
use crate::protocol::{Renewal, Renewed};
use crate::types::{FencingToken, LeaseState, Mode, OwnerId, ResourceKey};

use super::hold::{Hold, lost};
use super::service::Service;

/// One key as it is held.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LockedKey {
    /// What.
    pub key: ResourceKey,
    /// How.
    pub mode: Mode,
    /// The token to show to whatever the lock protects.
    pub token: FencingToken,
}

/// What is held, by whom, and whether it still is. A value that can be cloned and passed on.
#[derive(Clone, Debug)]
pub struct Locked {
    owner: OwnerId,
    keys: Arc<[LockedKey]>,
    state: Arc<LeaseState>,
}

impl Locked {
    /// Who holds it. Others in this process may re-enter as this owner while it holds.
    ///
    /// Another process is refused as busy where several requests of this process had waited for the
    /// lock, because the service does not know this owner then. To lend an owner to another
    /// process, make it with [`Locks::owner`](crate::Locks::owner) and name it in the request.
    #[must_use]
    pub fn owner(&self) -> OwnerId {
        self.owner
    }

    /// The keys with their modes and tokens, in the order in which they are locked.
    #[must_use]
    pub fn keys(&self) -> &[LockedKey] {
        &self.keys
    }

    /// The highest token among the keys; for a single key, its token.
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.keys.iter().map(|key| key.token).max().unwrap_or(FencingToken::FIRST)
    }

    /// Whether the lease still lasts, as far as this process can know.
    ///
    /// The answer is about now. What must not be done by a stale holder has to be fenced where it
    /// is done.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.state.is_held()
    }

    /// Resolves when the lease is lost; never while it is renewed in time.
    ///
    /// # Cancel safety
    /// Dropping the future has no effect.
    pub async fn lost(&self) {
        self.state.lost().cancelled().await;
    }

    /// Resolves when the lease is in danger: a third of it is left and it has not been renewed, so
    /// that a renewal has failed or is overdue. There is time to stop in good order. Where nobody
    /// renews, it is time for [`LockGuard::renew`].
    ///
    /// A lease that was lost or given up is in danger too. A renewal that succeeds later ends the
    /// danger; whoever then asks again waits for the next one.
    ///
    /// # Cancel safety
    /// Dropping the future has no effect.
    pub async fn expiring(&self) {
        self.state.expiring().await;
    }

    /// A token that is cancelled when the lease is lost, for code that watches one.
    #[must_use]
    pub fn cancellation_token(&self) -> CancellationToken {
        self.state.lost().child_token()
    }
}

/// How a lock stands.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LockInfo {
    /// Who holds it.
    pub owner: OwnerId,
    /// The keys with modes and tokens.
    pub keys: Vec<LockedKey>,
    /// Since when.
    pub held_for: Duration,
    /// When the lease ends unless it is renewed; zero when it is lost.
    pub expires_in: Duration,
    /// How often this client has entered the first key for this owner.
    pub hold_count: usize,
    /// The text that came with the request.
    pub metadata: Option<String>,
}

/// Holds locks until it is released or dropped.
///
/// Dropping it does no I/O: the release is handed to the watchdog of the lock service, which sends
/// it at once and tries again until the lease would have run out anyway. [`LockGuard::release`]
/// waits for the answer.
#[derive(Debug)]
#[must_use = "a guard that is dropped gives up its locks"]
pub struct LockGuard {
    service: Arc<Service>,
    locked: Locked,
    holds: Vec<Hold>,
    metadata: Option<String>,
    since: Instant,
}

impl LockGuard {
    pub(super) fn new(
        service: Arc<Service>,
        owner: OwnerId,
        state: Arc<LeaseState>,
        holds: Vec<Hold>,
        metadata: Option<String>,
    ) -> Self {
        let held = holds.iter().flat_map(|hold| hold.part().wants.iter().zip(hold.tokens()));
        let keys = held.map(|(want, token)| LockedKey {
            key: want.key.clone(),
            mode: want.mode,
            token: *token,
        });
        let since = holds.iter().map(Hold::since).min().unwrap_or_else(Instant::now);
        let locked = Locked { owner, keys: keys.collect(), state };
        Self { service, locked, holds, metadata, since }
    }

    /// A view of what is held that outlives the guard.
    #[must_use]
    pub fn locked(&self) -> &Locked {
        &self.locked
    }

    /// How the lock stands now.
    #[must_use]
    pub fn info(&self) -> LockInfo {
        let deadline = self.locked.state.deadline().filter(|_| self.is_held());
        let first = self.locked.keys.first();
        LockInfo {
            owner: self.locked.owner,
            keys: self.locked.keys.to_vec(),
            held_for: self.since.elapsed(),
            expires_in: deadline
                .map_or(Duration::ZERO, |at| at.saturating_duration_since(Instant::now())),
            hold_count: first
                .map_or(0, |held| self.service.owners.count(self.locked.owner, &held.key)),
            metadata: self.metadata.clone(),
        }
    }

    /// Renews by hand, for another full lease from now. The watchdog does this by itself unless the
    /// request said otherwise.
    ///
    /// # Errors
    /// [`LeaseLost`](crate::ErrorKind::LeaseLost) when the service no longer knows the grant, and
    /// [`Unavailable`](crate::ErrorKind::Unavailable) when it did not answer; then the lease runs
    /// on as before.
    ///
    /// # Cancel safety
    /// The renewal may have happened; calling it again is harmless.
    pub async fn renew(&self) -> Result<()> {
        for hold in &self.holds {
            if !self.is_held() {
                return Err(lost("renew", hold.part()));
            }
            let kept = hold.kept();
            let (part, lease) = (kept.part.clone(), kept.lease);
            let partition = part.partition;
            let renewals = [Renewal { part, lease, waiting: false }];
            let Service { wakefulness, .. } = &*self.service;
            let (slept, sent) = (wakefulness.slept(), Instant::now());
            let answer = self.service.backend.renew(partition, &renewals);
            let renewed = match self.service.call(answer).await?.first() {
                Some(Renewed::Held(_)) => kept.renewed(wakefulness.sent(sent, slept)),
                _ => false,
            };
            if !renewed {
                kept.lose();
                return Err(lost("renew", hold.part()));
            }
            self.service.counters.renewed();
        }
        Ok(())
    }

    /// Has grants that were handed over confirmed beside what comes next, because
    /// [`confirmed`](Self::confirmed) will be waited for.
    pub(crate) fn confirm_now(&self) {
        self.holds.iter().for_each(Hold::confirm_now);
    }

    /// Waits until the service has confirmed grants that were handed over by a push. Work may start
    /// before; what is done must not be made final before.
    ///
    /// # Errors
    /// [`LeaseLost`](crate::ErrorKind::LeaseLost) when the grant was not confirmed in time.
    ///
    /// # Cancel safety
    /// Dropping the future has no effect.
    pub async fn confirmed(&self) -> Result<()> {
        for hold in &self.holds {
            hold.confirmed().await?;
        }
        Ok(())
    }

    /// Gives the locks up and waits for the answer. Where somebody of this process waits for the
    /// same keys, they are passed on without asking the service.
    ///
    /// # Errors
    /// [`LeaseLost`](crate::ErrorKind::LeaseLost) when they had been lost before (as the service
    /// says, or, where they would be passed on, as this process knows), and
    /// [`Unavailable`](crate::ErrorKind::Unavailable) when the service did not answer; the watchdog
    /// then goes on trying until the lease has run out.
    ///
    /// # Cancel safety
    /// The locks are given up even if the future is dropped.
    pub async fn release(self) -> Result<()> {
        let was_held = self.is_held();
        let first = self.holds.first().map(|hold| hold.part().clone());
        let mut answer = Ok(());
        for hold in self.holds {
            answer = answer.and(hold.release().await);
        }
        match (was_held, first) {
            (false, Some(part)) => Err(lost("release", &part)),
            _ => answer,
        }
    }
}

impl Deref for LockGuard {
    type Target = Locked;

    fn deref(&self) -> &Locked {
        &self.locked
    }
}
