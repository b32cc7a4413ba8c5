//! Hand-over within the process: waiters for the same keys pass a lock among themselves.
//!
//! # A place stands for a group
//! Whoever finds its keys in use by this process asks the service for all who come after it: with
//! one request, under an owner id of the lane's own, and for a block of tokens. The others
//! join its *lane* and send nothing. When a holder gives up the lock, the next in the lane gets the
//! same grant with an owner, a lease state and a token of its own, the next of the block. The
//! service knows only the lane, so that none of the owner ids that requests have can re-enter a
//! grant that was passed on. (`inspect` shows the id of the group: whoever asks as that owner
//! does.)
//!
//! # Fairness
//! When somebody queues at the service directly behind a lane, the service says so, and nobody
//! joins that lane any more. Who was in it came first and is served first; then the grant is
//! released. So first come, first served holds across processes, up to the way of that notice. It
//! may be lost: whoever waits repeats it with each refresh.
//!
//! # When it ends
//! A lane ends when its grant cannot be passed on: nobody is left, no token is left, its lease is
//! lost or close to its end, or something else was locked under its owner. Whoever is left asks the
//! service anew, in order: the first as the carrier of the next lane.
//!
//! # Why a grant that was pushed may be passed on before it is confirmed
//! All who get it share one confirmation, and a transaction waits for it before it commits.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::types::{FencingToken, Lease, LeaseState, OwnerId, Partition, Want};

use super::hold::Hold;

/// How many tokens a lane asks for. A pass takes a few microseconds and a round trip to the service
/// about a hundred, so that with this many passes the round trip costs little more than one of
/// them; and a lane uses a block up more slowly than the clock runs.
const BLOCK: u32 = 256;

/// How waiters of one process hand a lock to each other.
///
/// It is faster by an order of magnitude where many tasks of one process want the same keys. It is
/// off unless it is asked for, because it asks something of the program: a request that was begun
/// must be polled until it ends, or dropped. One that is kept and not polled may keep the other
/// requests of its process from these keys until their time is over.
///
/// ```
/// let mut options = palisade::LockOptions::default();
/// options.hand_over.enabled = true;
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

/// What is locked in one way: a lane is for exactly this.
#[derive(Debug, PartialEq, Eq)]
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

/// All lanes of a lock service, by what they are for.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    table: Mutex<HashMap<Arc<KeySet>, Spot>>,
}

/// What this process does about one set of keys.
#[derive(Debug, Default)]
struct Spot {
    /// How many requests are under way or held by themselves.
    plain: usize,
    newest: Option<Arc<Lane>>,
}

/// How a request goes on.
pub(super) enum Way {
    /// Nobody here uses the keys: ask the service for this one alone.
    Alone(Seat),
    /// Ask the service for all who will join.
    Carry(Carrier),
    /// Wait until it is this one's turn.
    Join(Place),
}

/// What a waiter in a lane is told.
#[derive(Debug)]
pub(super) enum Turn {
    /// It holds its keys.
    Held(Hold),
    /// It is to ask the service, for itself and for those behind it.
    Carry(Carrier),
    /// It is to ask the service for itself.
    Alone,
}

/// A request that waits in a lane.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) owner: OwnerId,
    pub(super) state: Arc<LeaseState>,
    /// Whether it came after the lane was followed.
    late: bool,
    turn: oneshot::Sender<Turn>,
}

impl Waiter {
    /// Tells the waiter. What one that has gone does not take is dropped, and so passed on.
    pub(super) fn tell(self, turn: Turn) {
        drop(self.turn.send(turn));
    }

    fn is_gone(&self) -> bool {
        self.turn.is_closed()
    }
}

/// A place in a lane, given up when it is dropped.
pub(super) struct Place {
    pub(super) lane: Arc<Lane>,
    pub(super) turn: oneshot::Receiver<Turn>,
}

/// Marks keys as used by this process.
#[derive(Debug)]
pub(super) struct Seat {
    lanes: Arc<Lanes>,
    set: Arc<KeySet>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut table = self.lanes.lock();
        if let Some(spot) = table.get_mut(&self.set) {
            spot.plain = spot.plain.saturating_sub(1);
        }
        forget_if_unused(&mut table, &self.set);
    }
}

/// The request of a lane at the service, before it is granted. Dropped, it leaves the others to go
/// on without it.
#[derive(Debug)]
pub(super) struct Carrier {
    lane: Option<Arc<Lane>>,
}

impl Carrier {
    pub(super) fn lane(&self) -> Option<&Arc<Lane>> {
        self.lane.as_ref()
    }

    /// The grant was made: whoever holds it ends the lane.
    pub(super) fn granted(mut self) -> Option<Arc<Lane>> {
        self.lane.take()
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        if let Some(lane) = self.lane.take() {
            lane.end(None);
        }
    }
}

impl Lanes {
    /// Finds the way of a new request.
    pub(super) fn enter(
        self: &Arc<Self>,
        set: KeySet,
        (owner, state): (OwnerId, &Arc<LeaseState>),
        rules: LocalHandOver,
    ) -> Way {
        let set = Arc::new(set);
        let mut table = self.lock();
        let spot = table.entry(Arc::clone(&set)).or_default();
        if let Some(lane) = &spot.newest {
            let (turn, told) = oneshot::channel();
            let state = Arc::clone(state);
            if lane.join(Waiter { owner, state, late: false, turn }) {
                return Way::Join(Place { lane: Arc::clone(lane), turn: told });
            }
        } else if spot.plain == 0 {
            spot.plain = 1;
            return Way::Alone(Seat { lanes: Arc::clone(self), set });
        }
        let lane = Lane::new(Arc::clone(self), set, owner, rules, VecDeque::new());
        spot.newest = Some(Arc::clone(&lane));
        Way::Carry(Carrier { lane: Some(lane) })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Arc<KeySet>, Spot>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn forget_if_unused(table: &mut HashMap<Arc<KeySet>, Spot>, set: &Arc<KeySet>) {
    if table.get(set).is_some_and(|spot| spot.plain == 0 && spot.newest.is_none()) {
        table.remove(set);
    }
}

/// Requests of this process that one request at the service stands for.
pub(super) struct Lane {
    lanes: Arc<Lanes>,
    set: Arc<KeySet>,
    owner: OwnerId,
    rules: LocalHandOver,
    /// Whether the service has stopped answering.
    unanswered: AtomicBool,
    state: Mutex<State>,
}

struct State {
    waiters: VecDeque<Waiter>,
    /// The first token, once there is a grant.
    first: Option<FencingToken>,
    /// How many tokens there are, or were asked for.
    block: u32,
    /// How many of them are used, the one of the carrier among them.
    used: u32,
    /// Who holds the grant now.
    holder: Option<OwnerId>,
    /// Whether a holder has locked something else under the owner of the lane.
    shared: bool,
    followed: Option<Instant>,
    /// How many have joined since.
    late: u32,
    ended: bool,
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("owner", &self.owner).finish_non_exhaustive()
    }
}

impl Lane {
    /// `of` is any owner of this client.
    fn new(
        lanes: Arc<Lanes>,
        set: Arc<KeySet>,
        of: OwnerId,
        rules: LocalHandOver,
        waiters: VecDeque<Waiter>,
    ) -> Arc<Self> {
        let state = State {
            waiters,
            first: None,
            block: BLOCK,
            used: 1,
            holder: None,
            shared: false,
            followed: None,
            late: 0,
            ended: false,
        };
        let (unanswered, state) = (AtomicBool::new(false), Mutex::new(state));
        Arc::new(Self { lanes, set, owner: OwnerId::new(of.client()), rules, unanswered, state })
    }

    /// Who asks at the service.
    pub(super) fn owner(&self) -> OwnerId {
        self.owner
    }

    /// How many tokens are asked for.
    pub(super) fn block(&self) -> u32 {
        BLOCK
    }

    /// Takes a waiter in, if the lane is open to those who come now.
    fn join(&self, waiter: Waiter) -> bool {
        let mut state = self.lock();
        let late = state.followed.is_some();
        let in_time = state.followed.is_none_or(|since| since.elapsed() < self.rules.time);
        if state.ended || state.shared || !in_time || (late && state.late >= self.rules.passes) {
            return false;
        }
        if state.is_full() {
            state.waiters.retain(|waiter| !waiter.is_gone());
            if state.is_full() {
                return false;
            }
        }
        state.late += u32::from(late);
        state.waiters.push_back(Waiter { late, ..waiter });
        true
    }

    /// Somebody stands at the service behind this lane.
    pub(super) fn follow(&self) {
        self.lock().followed.get_or_insert_with(Instant::now);
    }

    pub(super) fn set_unanswered(&self, unanswered: bool) {
        self.unanswered.store(unanswered, Ordering::Relaxed);
    }

    pub(super) fn is_unanswered(&self) -> bool {
        self.unanswered.load(Ordering::Relaxed)
    }

    /// The service has granted the request of the lane. Waiters for whom there is no token ask anew
    /// at once.
    pub(super) fn granted(self: &Arc<Self>, holder: OwnerId, first: FencingToken, block: u32) {
        let mut state = self.lock();
        state.first = Some(first);
        state.block = block;
        state.holder = Some(holder);
        let served = usize::try_from(block.saturating_sub(1)).unwrap_or(usize::MAX);
        let surplus = state.waiters.len().min(served);
        let surplus = state.waiters.split_off(surplus);
        drop(state);
        if !surplus.is_empty() {
            self.leave_to_others(surplus);
        }
    }

    /// Whether `owner` still holds the grant. If so, it is not passed on any more: what else is
    /// locked under the owner of the lane would go with it.
    pub(super) fn share(&self, owner: OwnerId) -> bool {
        let mut state = self.lock();
        let holds = state.holder == Some(owner);
        state.shared |= holds;
        holds
    }

    /// The next holder, with the token that the service knows, and its own; from here on the grant
    /// is its.
    pub(super) fn next(&self) -> Option<(Waiter, FencingToken, FencingToken)> {
        let mut state = self.lock();
        while state.waiters.front().is_some_and(Waiter::is_gone) {
            state.waiters.pop_front();
        }
        let first = state.first.filter(|_| !state.ended && !state.shared)?;
        let late = state.waiters.front()?.late;
        let over = state.followed.is_some_and(|since| since.elapsed() >= self.rules.time);
        if state.used >= state.block || (late && over) {
            return None;
        }
        let token = FencingToken::new(first.get() + u64::from(state.used))?;
        let next = state.waiters.pop_front()?;
        state.used += 1;
        state.holder = Some(next.owner);
        Some((next, first, token))
    }

    /// Ends the lane. Whoever is left, `first` before the others, asks the service anew.
    pub(super) fn end(self: &Arc<Self>, first: Option<Waiter>) {
        let mut left = self.close();
        if let Some(first) = first {
            left.push_front(first);
        }
        self.leave_to_others(left);
    }

    /// Ends the lane because the service does not answer: everybody asks for itself, and learns of
    /// it within its own time.
    pub(super) fn disperse(self: &Arc<Self>) {
        let left = self.close();
        self.leave_to_others(VecDeque::new());
        left.into_iter().for_each(|waiter| waiter.tell(Turn::Alone));
    }

    fn close(&self) -> VecDeque<Waiter> {
        let mut state = self.lock();
        state.ended = true;
        state.holder = None;
        std::mem::take(&mut state.waiters)
    }

    /// Takes this lane out of the table, and puts `waiters` into the lane that came after it, or
    /// into a new one whose carrier is the first of them.
    fn leave_to_others(self: &Arc<Self>, mut waiters: VecDeque<Waiter>) {
        waiters.retain(|waiter| !waiter.is_gone());
        let mut table = self.lanes.lock();
        let spot = table.entry(Arc::clone(&self.set)).or_default();
        spot.newest.take_if(|newest| Arc::ptr_eq(newest, self));
        if let Some(later) = &spot.newest {
            waiters = later.take_before(waiters);
        }
        let Some(first) = waiters.pop_front() else {
            return forget_if_unused(&mut table, &self.set);
        };
        let (lanes, set) = (Arc::clone(&self.lanes), Arc::clone(&self.set));
        let lane = Lane::new(lanes, set, self.owner, self.rules, waiters);
        spot.newest = Some(Arc::clone(&lane));
        drop(table);
        first.tell(Turn::Carry(Carrier { lane: Some(lane) }));
    }

    /// Puts waiters who came earlier before those who are here. Returns them if the lane has ended.
    fn take_before(&self, mut earlier: VecDeque<Waiter>) -> VecDeque<Waiter> {
        let mut state = self.lock();
        if state.ended {
            return earlier;
        }
        earlier.iter_mut().for_each(|waiter| waiter.late = false);
        earlier.append(&mut state.waiters);
        state.waiters = earlier;
        VecDeque::new()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_full(&self) -> bool {
        let waiting = u32::try_from(self.waiters.len()).unwrap_or(u32::MAX);
        self.used.saturating_add(waiting) >= self.block
    }
}
