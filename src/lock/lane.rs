//! Hand-over within the process: waiters for the same keys pass a lock among themselves.
//!
//! # A lane stands for a group
//! Who finds its keys in use by this process waits for a *lane*: one request at the service for all
//! who come, sent by a task of the lock service, under an owner of its own and for a block of
//! tokens. When it is granted, the first who waits gets the grant, with an owner, a lease state and
//! a token of its own, the next of the block; and whoever gives the lock up passes it to the next.
//! The service knows only the lane. Nobody may ask as its owner, which is marked as one.
//!
//! # Why no caller asks for the others
//! It could be dropped, time out, or be kept and not polled, and each of these would cost the
//! others their place or their turn. So a place in the service's line lasts for as long as anybody
//! waits for it, whoever that is, and only who was handed the lock can keep it from the others.
//!
//! # Fairness
//! When somebody queues at the service directly behind a lane, the service says so, and nobody
//! joins that lane any more: who comes later waits for the next one. A lane serves nobody who waits
//! for a later one. So first come, first served holds across processes, up to the way of that
//! notice. It may be lost: whoever waits repeats it with each refresh.
//!
//! # When it ends
//! A lane ends when its grant cannot be passed on: nobody is left whom it may serve, no token is
//! left, its lease is lost or close to its end, or something else was locked under its owner.
//! Whoever is left waits, in order, for the lanes that came after it, and for a new one.
//!
//! # If the process dies, stops, or hears nothing
//! *In line*, the lane is dropped by the service after three refreshes; a process that was stopped
//! for longer asks anew. If the answer to its first call is lost, so is the call: everybody in the
//! lane learns that the service did not answer, and the request is cancelled. A lost answer to a
//! refresh is made up for by the next. *Granted*, the lane holds its keys for a claim, and for a
//! lease once that is confirmed; a lost push is made up for by the next refresh. *Passing on* sends
//! nothing: a process that dies in the midst holds the keys for what is left of the lease, and one
//! that was stopped for longer finds the grant too old to be passed on. What was passed to somebody
//! who never looks is renewed for one lease, and then lapses. *Giving up* is a release like any
//! other: sent again until it is answered, or its lease is over.
//!
//! # Why a grant that was pushed may be passed on before it is confirmed
//! All who get it share one confirmation, and a transaction waits for it before it commits.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep_until};

use crate::error::Error;
use crate::types::{FencingToken, Lease, LeaseState, OwnerId, Partition, Want};

use super::crowd::Crowd;
use super::hold::Hold;

/// How many tokens a lane asks for. A pass takes a few microseconds and a round trip to the service
/// about a hundred, so that with this many passes the round trip costs little more than one of
/// them; and a lane uses a block up more slowly than the clock runs.
pub(super) const BLOCK: u32 = 256;

/// How waiters of one process hand a lock to each other.
///
/// It is faster by an order of magnitude where many tasks of one process want the same keys, and
/// nobody of another process is overtaken. Requests take part that wait for exclusive keys, all in
/// one partition, without naming an owner, a floor or metadata.
///
/// ```
/// let mut options = palisade::LockOptions::default();
/// options.hand_over.enabled = false;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LocalHandOver {
    /// Whether they do. If not, the service decides about each hand-over.
    pub enabled: bool,
    /// To how many requests a lock may still be passed that came after somebody else had queued for
    /// it. With 0 nobody is overtaken.
    pub passes: u32,
    /// For how long after that.
    pub time: Duration,
}

impl Default for LocalHandOver {
    fn default() -> Self {
        Self { enabled: true, passes: 0, time: Duration::ZERO }
    }
}

/// What is locked in one way: a lane is for exactly this.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KeySet {
    pub(super) partition: Partition,
    pub(super) lease: Lease,
    pub(super) wants: Arc<[Want]>,
}

impl Hash for KeySet {
    /// One key tells most sets apart, and a set may have a thousand.
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.partition.hash(state);
        self.wants.first().hash(state);
    }
}

/// Who wants to wait for a lane.
pub(super) struct Asks {
    pub(super) owner: OwnerId,
    pub(super) state: Arc<LeaseState>,
    pub(super) deadline: Instant,
}

/// What a waiter is told.
#[derive(Debug)]
pub(super) enum Turn {
    /// It holds its keys.
    Held(Hold),
    /// The request that stood for it and others failed.
    Failed(Arc<Error>),
    /// It is to ask the service for itself.
    Alone,
}

/// A request that waits for a lane.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) owner: OwnerId,
    pub(super) state: Arc<LeaseState>,
    pub(super) deadline: Instant,
    /// Its place among all who wait for the same keys here.
    pub(super) place: u64,
    /// The lane that it waits for.
    pub(super) lane: u64,
    /// Whether it came after that lane was followed.
    pub(super) late: bool,
    pub(super) turn: oneshot::Sender<Turn>,
}

impl Waiter {
    /// Tells the waiter. What one that has gone does not take is dropped, and so passed on.
    pub(super) fn tell(self, turn: Turn) {
        drop(self.turn.send(turn));
    }

    /// Whether nothing can be done for it any more. Its future may not have noticed yet.
    pub(super) fn is_gone(&self) -> bool {
        self.deadline <= Instant::now() || !self.state.is_held()
    }
}

/// A place among those who wait, given up when it is dropped.
pub(super) struct Place {
    crowd: Arc<Crowd>,
    number: u64,
    turn: oneshot::Receiver<Turn>,
    told: bool,
}

impl Place {
    pub(super) fn new(crowd: Arc<Crowd>, number: u64, turn: oneshot::Receiver<Turn>) -> Self {
        Self { crowd, number, turn, told: false }
    }

    /// Waits for the turn; `None` when it can never come.
    pub(super) async fn turn(&mut self) -> Option<Turn> {
        let turn = (&mut self.turn).await.ok();
        self.told = true;
        turn
    }

    /// Whether the service has stopped answering, or has not answered for `least`.
    pub(super) fn is_unanswered(&self, least: Duration) -> bool {
        self.crowd.is_unanswered(least)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.told {
            self.crowd.leave(self.number);
        }
    }
}

/// One request at the service, and the right to serve those who wait for it.
pub(super) struct Lane {
    crowd: Arc<Crowd>,
    /// Later lanes have higher numbers.
    pub(super) number: u64,
    owner: OwnerId,
    /// Told when nobody waits for it any more.
    pub(super) left: Notify,
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("owner", &self.owner).finish_non_exhaustive()
    }
}

impl Lane {
    pub(super) fn new(crowd: Arc<Crowd>, number: u64, owner: OwnerId) -> Arc<Self> {
        Arc::new(Self { crowd, number, owner, left: Notify::new() })
    }

    /// Who asks at the service.
    pub(super) fn owner(&self) -> OwnerId {
        self.owner
    }

    /// What it asks for.
    pub(super) fn set(&self) -> &KeySet {
        &self.crowd.set
    }

    /// Somebody stands at the service behind this lane.
    pub(super) fn follow(&self) {
        self.crowd.follow(self.number);
    }

    /// The request was sent now, or has been answered.
    pub(super) fn asked(&self, open: bool) {
        self.crowd.asked(self.number, open);
    }

    /// What became of the last call that kept the request or its grant alive.
    pub(super) fn set_unanswered(&self, unanswered: bool) {
        self.crowd.set_unanswered(unanswered);
    }

    /// Resolves when nobody waits for this lane any more; then it has ended.
    pub(super) async fn deserted(&self) {
        while let Some(latest) = self.crowd.latest(self.number) {
            tokio::select! {
                () = self.left.notified() => {}
                () = sleep_until(latest) => {}
            }
        }
    }

    /// The service has granted the request. Returns who gets the grant; if nobody is left, the lane
    /// has ended.
    pub(super) fn granted(&self, first: FencingToken, block: u32) -> Option<Waiter> {
        self.crowd.granted(self.number, first, block).map(|(waiter, ..)| waiter)
    }

    /// The next holder, if `pass` makes its state the one of the grant, with the token that the
    /// service knows, and its own. `None` when the grant is not passed on; then the lane has ended.
    pub(super) fn next(
        &self,
        pass: impl FnOnce(&Arc<LeaseState>) -> bool,
    ) -> Option<(Waiter, FencingToken, FencingToken)> {
        self.crowd.next(self.number, pass)
    }

    /// Whether `owner` still holds the grant. If so, it is not passed on any more: what else is
    /// locked under the owner of the lane would go with it.
    pub(super) fn share(&self, owner: OwnerId) -> bool {
        self.crowd.share(self.number, owner)
    }

    /// The grant is lost.
    pub(super) fn end(&self) {
        self.crowd.end(self.number);
    }

    /// Ends a lane that was not granted, and tells all who wait for it.
    pub(super) fn disband(&self, turn: impl Fn() -> Turn) {
        self.crowd.disband(self.number, turn);
    }
}
