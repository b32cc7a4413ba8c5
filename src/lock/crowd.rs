//! All requests of this process for one set of keys: who waits, in order, and for which lane.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::types::{ClientId, FencingToken, LeaseState, OwnerId};

use super::lane::{Asks, BLOCK, KeySet, Lane, LocalHandOver, Place, Turn, Waiter};
use super::service::Service;

/// The crowds of a lock service, by what they want.
#[derive(Debug)]
pub(super) struct Crowds {
    table: Mutex<HashMap<KeySet, Spot>>,
    client: ClientId,
    rules: LocalHandOver,
    /// Asks for the lanes, in tasks that run here. Who waits keeps it alive.
    service: Weak<Service>,
    runtime: Handle,
}

/// What this process does about one set of keys.
#[derive(Debug, Default)]
struct Spot {
    /// How many requests are under way or held by themselves.
    plain: usize,
    crowd: Option<Arc<Crowd>>,
}

/// How a request goes on.
pub(super) enum Way {
    /// Nobody here uses the keys: ask the service for this one alone.
    Alone(Seat),
    /// Wait until it is this one's turn.
    Join(Place),
}

/// Marks keys as used by this process.
#[derive(Debug)]
pub(super) struct Seat {
    crowds: Arc<Crowds>,
    set: KeySet,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut table = self.crowds.lock();
        if let Some(spot) = table.get_mut(&self.set) {
            spot.plain = spot.plain.saturating_sub(1);
            if spot.plain == 0 && spot.crowd.is_none() {
                table.remove(&self.set);
            }
        }
    }
}

impl Crowds {
    pub(super) fn new(client: ClientId, rules: LocalHandOver, service: Weak<Service>) -> Self {
        Self { table: Mutex::default(), client, rules, service, runtime: Handle::current() }
    }

    /// Finds the way of a new request.
    pub(super) fn enter(self: &Arc<Self>, set: KeySet, asks: Asks) -> Way {
        let mut table = self.lock();
        let spot = table.entry(set.clone()).or_default();
        if spot.crowd.is_none() && spot.plain == 0 {
            spot.plain = 1;
            return Way::Alone(Seat { crowds: Arc::clone(self), set });
        }
        let crowd = spot.crowd.get_or_insert_with(|| Crowd::new(Arc::clone(self), set));
        let crowd = Arc::clone(crowd);
        let (place, founded) = crowd.join(asks);
        drop(table);
        self.start(founded);
        Way::Join(place)
    }

    /// Has the service asked for lanes. Not under a lock: on a runtime that was shut down the task
    /// is dropped at once, and disbands its lane.
    fn start(&self, founded: impl IntoIterator<Item = Arc<Lane>>) {
        for lane in founded {
            if let Some(service) = self.service.upgrade() {
                drop(self.runtime.spawn(service.carry(lane)));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<KeySet, Spot>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Those who wait for one set of keys, and the lanes that stand for them.
#[derive(Debug)]
pub(super) struct Crowd {
    crowds: Arc<Crowds>,
    pub(super) set: KeySet,
    /// Whether the last call that kept one of the lanes alive was left unanswered.
    unanswered: AtomicBool,
    state: Mutex<State>,
}

/// Each waiter waits for a lane that is there; both are in order of arrival.
#[derive(Debug, Default)]
struct State {
    waiters: VecDeque<Waiter>,
    lanes: VecDeque<Standing>,
    /// The last number of a waiter or a lane.
    last: u64,
}

/// How a lane stands.
#[derive(Debug)]
struct Standing {
    lane: Arc<Lane>,
    /// How many wait for it.
    waiters: u32,
    grant: Option<Passing>,
    /// Whether a holder has locked something else under the owner of the lane.
    shared: bool,
    followed: Option<Instant>,
    /// How many have joined since.
    late: u32,
    /// When the request was sent that has not been answered.
    sent: Option<Instant>,
}

/// The grant of a lane, as it goes from hand to hand.
#[derive(Debug)]
struct Passing {
    first: FencingToken,
    block: u32,
    /// How many tokens of the block are used.
    used: u32,
    holder: Option<OwnerId>,
}

impl Crowd {
    fn new(crowds: Arc<Crowds>, set: KeySet) -> Arc<Self> {
        let (unanswered, state) = (AtomicBool::new(false), Mutex::default());
        Arc::new(Self { crowds, set, unanswered, state })
    }

    /// Takes a waiter in, behind the newest lane if that is open, or behind a new one.
    fn join(self: &Arc<Self>, asks: Asks) -> (Place, Option<Arc<Lane>>) {
        let rules = self.crowds.rules;
        let mut state = self.lock();
        let open = state.lanes.back().is_some_and(|newest| newest.is_open(rules));
        let founded = (!open).then(|| state.found(self));
        state.last += 1;
        let place = state.last;
        let (turn, told) = oneshot::channel();
        if let Some(newest) = state.lanes.back_mut() {
            newest.waiters += 1;
            let (lane, late) = (newest.lane.number, newest.followed.is_some());
            newest.late += u32::from(late);
            let Asks { owner, state: lease, deadline } = asks;
            state.waiters.push_back(Waiter {
                owner,
                state: lease,
                deadline,
                place,
                lane,
                late,
                turn,
            });
        }
        (Place::new(Arc::clone(self), place, told), founded)
    }

    /// Takes a waiter out that does not wait any more.
    pub(super) fn leave(&self, place: u64) {
        let mut state = self.lock();
        if let Ok(at) = state.waiters.binary_search_by_key(&place, |waiter| waiter.place)
            && let Some(gone) = state.waiters.remove(at)
        {
            state.leaves(gone.lane);
        }
    }

    pub(super) fn set_unanswered(&self, unanswered: bool) {
        self.unanswered.store(unanswered, Ordering::Relaxed);
    }

    pub(super) fn is_unanswered(&self, least: Duration) -> bool {
        let silent = |lane: &Standing| lane.sent.is_some_and(|at| at.elapsed() >= least);
        self.unanswered.load(Ordering::Relaxed) || self.lock().lanes.iter().any(silent)
    }

    pub(super) fn asked(&self, lane: u64, open: bool) {
        if let Some(standing) = self.lock().find(lane) {
            standing.sent = open.then(Instant::now);
        }
        if !open {
            self.set_unanswered(false);
        }
    }

    pub(super) fn follow(&self, lane: u64) {
        if let Some(standing) = self.lock().find(lane) {
            standing.followed.get_or_insert_with(Instant::now);
        }
    }

    /// Until when somebody waits for the lane, who may give up sooner. Ends it if nobody does.
    pub(super) fn latest(self: &Arc<Self>, lane: u64) -> Option<Instant> {
        let state = self.lock();
        let mine = state.waiters.iter().filter(|waiter| waiter.lane == lane && !waiter.is_gone());
        let latest = mine.map(|waiter| waiter.deadline).max();
        if latest.is_none() {
            self.end_in(state, lane);
        }
        latest
    }

    /// Who gets the grant of a lane that was made now. Whoever it has no token for waits for
    /// another lane.
    pub(super) fn granted(
        self: &Arc<Self>,
        lane: u64,
        first: FencingToken,
        block: u32,
    ) -> Option<(Waiter, FencingToken, FencingToken)> {
        let mut state = self.lock();
        let block = block.max(1);
        let mut founded = Vec::new();
        if let Some(standing) = state.find(lane) {
            standing.grant = Some(Passing { first, block, used: 0, holder: None });
            if standing.waiters > block {
                founded = state.assign(self);
            }
        }
        let next = state.next(lane, self.crowds.rules, |_| true);
        match next {
            Some(_) => drop(state),
            None => self.end_in(state, lane),
        }
        self.crowds.start(founded);
        next
    }

    pub(super) fn next(
        self: &Arc<Self>,
        lane: u64,
        pass: impl FnOnce(&Arc<LeaseState>) -> bool,
    ) -> Option<(Waiter, FencingToken, FencingToken)> {
        let mut state = self.lock();
        let next = state.next(lane, self.crowds.rules, pass);
        if next.is_none() {
            self.end_in(state, lane);
        }
        next
    }

    /// Whether `owner` holds the grant of the lane. Then it is not passed on, and whoever waits for
    /// it waits for another one.
    pub(super) fn share(self: &Arc<Self>, lane: u64, owner: OwnerId) -> bool {
        let mut state = self.lock();
        let Some(standing) = state.find(lane) else { return false };
        let holder = standing.grant.as_ref().and_then(|grant| grant.holder);
        if holder != Some(owner) {
            return false;
        }
        standing.shared = true;
        let founded = state.assign(self);
        drop(state);
        self.crowds.start(founded);
        true
    }

    pub(super) fn end(self: &Arc<Self>, lane: u64) {
        self.end_in(self.lock(), lane);
    }

    /// Takes a lane away. Whoever waits for it waits for another one.
    fn end_in(self: &Arc<Self>, mut state: MutexGuard<'_, State>, lane: u64) {
        let Some(ended) = state.take(lane) else { return };
        let founded = if ended.waiters > 0 { state.assign(self) } else { Vec::new() };
        self.leave_idle(state);
        self.crowds.start(founded);
    }

    /// Takes a lane away that was not granted, and tells all who wait for it.
    pub(super) fn disband(&self, lane: u64, turn: impl Fn() -> Turn) {
        let mut state = self.lock();
        if state.find(lane).is_none_or(|standing| standing.grant.is_some()) {
            return;
        }
        state.take(lane);
        let waiters = std::mem::take(&mut state.waiters).into_iter();
        let (mine, others) = waiters.partition::<VecDeque<_>, _>(|waiter| waiter.lane == lane);
        state.waiters = others;
        self.leave_idle(state);
        mine.into_iter().for_each(|waiter| waiter.tell(turn()));
    }

    /// Unlocks, and takes the crowd out of the table if there is nothing left of it.
    fn leave_idle(&self, state: MutexGuard<'_, State>) {
        let idle = state.is_idle();
        // The table is locked before a crowd.
        drop(state);
        if !idle {
            return;
        }
        let mut table = self.crowds.lock();
        let Some(spot) = table.get_mut(&self.set) else { return };
        let state = self.lock();
        // A crowd that was here before may have been replaced.
        let mine =
            spot.crowd.as_ref().is_some_and(|crowd| Arc::as_ptr(crowd) == std::ptr::from_ref(self));
        if mine && state.is_idle() {
            drop(state);
            spot.crowd = None;
            if spot.plain == 0 {
                table.remove(&self.set);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_idle(&self) -> bool {
        self.waiters.is_empty() && self.lanes.is_empty()
    }

    fn find(&mut self, lane: u64) -> Option<&mut Standing> {
        self.lanes.iter_mut().find(|standing| standing.lane.number == lane)
    }

    fn take(&mut self, lane: u64) -> Option<Standing> {
        let at = self.lanes.iter().position(|standing| standing.lane.number == lane)?;
        self.lanes.remove(at)
    }

    fn found(&mut self, crowd: &Arc<Crowd>) -> Arc<Lane> {
        self.last += 1;
        let owner = OwnerId::group(crowd.crowds.client);
        let lane = Lane::new(Arc::clone(crowd), self.last, owner);
        self.lanes.push_back(Standing {
            lane: Arc::clone(&lane),
            waiters: 0,
            grant: None,
            shared: false,
            followed: None,
            late: 0,
            sent: None,
        });
        lane
    }

    /// Takes the first waiter that is left, if the lane may serve it and `pass` agrees.
    fn next(
        &mut self,
        lane: u64,
        rules: LocalHandOver,
        pass: impl FnOnce(&Arc<LeaseState>) -> bool,
    ) -> Option<(Waiter, FencingToken, FencingToken)> {
        while let Some(gone) = self.waiters.pop_front_if(|waiter| waiter.is_gone()) {
            self.leaves(gone.lane);
        }
        let standing = self.lanes.iter_mut().find(|standing| standing.lane.number == lane)?;
        let over = standing.is_over(rules);
        let grant = standing.grant.as_mut().filter(|grant| grant.used < grant.block)?;
        let token = FencingToken::new(grant.first.get() + u64::from(grant.used))?;
        let may = |waiter: &Waiter| {
            !standing.shared && waiter.lane <= lane && !(waiter.late && over) && pass(&waiter.state)
        };
        let next = self.waiters.front().is_some_and(may).then(|| self.waiters.pop_front())??;
        grant.used += 1;
        grant.holder = Some(next.owner);
        let first = grant.first;
        self.leaves(next.lane);
        Some((next, first, token))
    }

    /// One less waits for a lane.
    fn leaves(&mut self, lane: u64) {
        if let Some(standing) = self.find(lane) {
            standing.waiters = standing.waiters.saturating_sub(1);
            standing.tell_if_deserted();
        }
    }

    /// Has everyone wait for the first lane that may serve it and has a token for it. Founds lanes
    /// for those for whom there is none.
    fn assign(&mut self, crowd: &Arc<Crowd>) -> Vec<Arc<Lane>> {
        self.waiters.retain(|waiter| !waiter.is_gone());
        self.lanes.iter_mut().for_each(|standing| standing.waiters = 0);
        let (mut at, mut founded) = (0, Vec::new());
        let mut waiters = std::mem::take(&mut self.waiters);
        for waiter in &mut waiters {
            while self
                .lanes
                .get(at)
                .is_some_and(|next| next.lane.number < waiter.lane || next.room() == 0)
            {
                at += 1;
            }
            if at >= self.lanes.len() {
                founded.push(self.found(crowd));
            }
            if let Some(standing) = self.lanes.get_mut(at) {
                standing.waiters += 1;
                waiter.late &= waiter.lane == standing.lane.number;
                waiter.lane = standing.lane.number;
            }
        }
        self.waiters = waiters;
        self.lanes.iter().for_each(Standing::tell_if_deserted);
        founded
    }
}

impl Standing {
    /// For how many more there are tokens.
    fn room(&self) -> u32 {
        let left = self.grant.as_ref().map_or(BLOCK, |grant| grant.block - grant.used);
        if self.shared { 0 } else { left.saturating_sub(self.waiters) }
    }

    /// Whether it was followed so long ago that only those are served who came before.
    fn is_over(&self, rules: LocalHandOver) -> bool {
        self.followed.is_some_and(|since| since.elapsed() >= rules.time)
    }

    /// Whether whoever comes now may wait for it.
    fn is_open(&self, rules: LocalHandOver) -> bool {
        let late = self.followed.is_some() && self.late >= rules.passes;
        self.room() > 0 && !late && !self.is_over(rules)
    }

    /// Tells a lane that was not granted when nobody waits for it any more.
    fn tell_if_deserted(&self) {
        if self.waiters == 0 && self.grant.is_none() {
            self.lane.left.notify_one();
        }
    }
}
