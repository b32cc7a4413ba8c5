//! What all handles of one lock service share, and how a set of keys is acquired.
//!
//! A set is asked for partition by partition, in order; each part is held as a whole or not at all,
//! and when a later part fails, the earlier ones are given up again.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backend::LockBackend;
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{Acquire, Acquired, Admission, Backoff, Grant, Part, Standing};
use crate::types::{
    ClientId, FencingToken, Lease, LeaseState, Mode, OwnerId, Partition, RequestId, Want,
};

use super::LockOptions;
use super::hold::{Hold, Kept, Taker, lost};
use super::lane::{self, Carrier, KeySet, Lane, Lanes, Place, Seat, Way};
use super::owners::{Alias, Entrance, Owners};
use super::schedule::{Job, Schedule};
use super::statistics::Counters;
use super::wait::{Turn, Waiting};

pub(super) struct Service {
    pub(super) backend: Arc<dyn LockBackend>,
    pub(super) client: ClientId,
    pub(super) options: LockOptions,
    pub(super) owners: Arc<Owners>,
    pub(super) lanes: Arc<Lanes>,
    pub(super) schedule: Arc<Schedule>,
    pub(super) counters: Arc<Counters>,
    pub(super) closing: CancellationToken,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { backend, client, .. } = self;
        f.debug_struct("Service").field("backend", backend).field("client", client).finish()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.backend.unsubscribe(self.client);
        self.schedule.stop();
    }
}

/// What is asked for, and how.
#[derive(Clone, Debug)]
pub(super) struct Order {
    /// Sorted by (partition, key), each key once.
    pub(super) wants: Vec<(Partition, Want)>,
    pub(super) owner: OwnerId,
    /// Whether the owner may be known to another process, which then knows it at the service.
    pub(super) lent: bool,
    pub(super) lease: Lease,
    /// Until when to wait; `None` tries once.
    pub(super) deadline: Option<Instant>,
    pub(super) retry: Backoff,
    pub(super) limit: u32,
    pub(super) floor: Option<FencingToken>,
    pub(super) metadata: Option<String>,
    pub(super) renews: bool,
    pub(super) max_hold: Duration,
    pub(super) state: Arc<LeaseState>,
}

/// How one call for one part may go on.
#[derive(Clone, Copy)]
struct Terms {
    standing: Standing,
    queue: bool,
    retry: bool,
    re_enters: bool,
    /// Under which name the service knows the owner, if not its own.
    alias: Option<Alias>,
}

/// For whom the service is asked.
#[derive(Default)]
struct Asking {
    carrier: Option<Carrier>,
    seat: Option<Seat>,
}

impl Asking {
    fn lane(&self) -> Option<&Arc<Lane>> {
        self.carrier.as_ref().and_then(Carrier::lane)
    }
}

impl Service {
    /// Acquires everything that was ordered, or nothing.
    pub(super) async fn acquire(self: &Arc<Self>, order: &Order) -> Result<Vec<Hold>> {
        let started = Instant::now();
        let answer = tokio::select! {
            biased;
            () = self.closing.cancelled() => Err(closed()),
            answer = self.acquire_parts(order) => answer,
        };
        match &answer {
            Ok(_) => self.counters.waited(started.elapsed()),
            Err(error) => self.counters.failed(error),
        }
        answer
    }

    async fn acquire_parts(self: &Arc<Self>, order: &Order) -> Result<Vec<Hold>> {
        if !self.schedule.is_alive() {
            return Err(closed());
        }
        let mut holds = Vec::new();
        for part in order.wants.chunk_by(|(a, _), (b, _)| a == b) {
            let Some((partition, _)) = part.first() else { continue };
            let wants: Vec<Want> = part.iter().map(|(_, want)| want.clone()).collect();
            self.enter(order, *partition, wants, &mut holds).await?;
        }
        Ok(holds)
    }

    /// Asks the books, then the service, for the keys of one partition.
    async fn enter(
        self: &Arc<Self>,
        order: &Order,
        partition: Partition,
        wants: Vec<Want>,
        holds: &mut Vec<Hold>,
    ) -> Result<()> {
        let mut todo = vec![wants];
        while let Some(wants) = todo.pop() {
            let Entrance::Open(admission, ticket, alias) =
                self.owners.enter(self.client, order.owner, partition, &wants)
            else {
                let detail = "a store has rejected this owner's token; start over as a new owner";
                return Err(Error::new(ErrorKind::StaleToken, "acquire", detail));
            };
            let terms = match admission {
                Admission::Ask { standing, queue, retry } => {
                    Terms { standing, queue, retry, re_enters: ticket.is_none(), alias }
                }
                Admission::Split { held, new } => {
                    todo.extend([new, held]);
                    continue;
                }
                Admission::Upgrade(want) => return Err(self.upgrade(order, want)),
                Admission::Waiting => {
                    let why = "another request of this owner is under way";
                    return Err(self.would_deadlock(order, why));
                }
            };
            match self.ask(order, partition, &wants, terms).await? {
                Some(hold) => holds.push(hold),
                None => todo.push(wants),
            }
        }
        Ok(())
    }

    /// Asks until there is a grant, a refusal, or no time left; `None` when the books have to be
    /// asked again, because what was to be re-entered was given up meanwhile.
    async fn ask(
        self: &Arc<Self>,
        order: &Order,
        partition: Partition,
        wants: &[Want],
        terms: Terms,
    ) -> Result<Option<Hold>> {
        let started = Instant::now();
        let mut attempt = 0;
        let mut asking = Asking::default();
        match self.way(order, partition, wants, terms) {
            Some(Way::Alone(seat)) => asking.seat = Some(seat),
            Some(Way::Carry(carrier)) => asking.carrier = Some(carrier),
            Some(Way::Join(place)) => match self.stand_in_lane(order, wants, place).await? {
                lane::Turn::Held(hold) => return held(order, hold).map(Some),
                lane::Turn::Carry(carrier) => asking.carrier = Some(carrier),
                lane::Turn::Alone => {}
            },
            None => {}
        }
        loop {
            if !self.schedule.is_alive() {
                return Err(closed());
            }
            let ask = self.request(order, partition, wants, terms, &asking);
            let refusal = match self.ask_once(order, terms, ask, &mut asking).await {
                Ok(Answer::Held(hold)) => return held(order, hold).map(Some),
                Ok(Answer::Forgotten) => continue,
                Ok(Answer::Busy(error, waiters)) => (error, waiters),
                Err(error) => {
                    if let Some(lane) = asking.lane().filter(|_| error.is_unavailable()) {
                        lane.disperse();
                    }
                    return Err(error);
                }
            };
            let pause = self.pause(order, terms, refusal, attempt, started.elapsed())?;
            tokio::time::sleep(pause).await;
            if terms.re_enters {
                return Ok(None);
            }
            attempt += 1;
        }
    }

    fn request(
        &self,
        order: &Order,
        partition: Partition,
        wants: &[Want],
        terms: Terms,
        asking: &Asking,
    ) -> Acquire {
        let lane = asking.lane();
        let alias = lane.map(|lane| lane.owner()).or(terms.alias.map(|alias| alias.owner));
        let (owner, request) = (alias.unwrap_or(order.owner), RequestId::next());
        Acquire {
            part: Part { partition, owner, request, wants: wants.to_vec() },
            client: self.client,
            lease: order.lease,
            standing: terms.standing,
            wait: terms.queue && order.deadline.is_some(),
            floor: order.floor,
            limit: order.limit,
            block: lane.map_or(1, |lane| lane.block()),
            metadata: order.metadata.clone(),
        }
    }

    /// How a request goes on that may share a place in line with others of this process: one that
    /// waits for exclusive keys in one partition, as an owner that nobody else knows. `None` for
    /// any other.
    fn way(
        &self,
        order: &Order,
        partition: Partition,
        wants: &[Want],
        terms: Terms,
    ) -> Option<Way> {
        let rules = self.options.hand_over;
        let may =
            rules.enabled && order.renews && !order.lent && self.backend.capabilities().pushes;
        let waits = terms.queue && terms.standing == Standing::Fresh && order.deadline.is_some();
        let plain = order.metadata.is_none() && order.floor.is_none();
        let whole = wants.len() == order.wants.len();
        let exclusive = || wants.iter().all(|want| want.mode == Mode::Exclusive);
        (may && waits && plain && whole && exclusive()).then(|| {
            let set = KeySet { partition, lease: order.lease, wants: wants.to_vec() };
            self.lanes.enter(set, (order.owner, &order.state, order.max_hold), rules)
        })
    }

    async fn stand_in_lane(
        &self,
        order: &Order,
        wants: &[Want],
        place: Place,
    ) -> Result<lane::Turn> {
        let started = Instant::now();
        let Place { lane, turn } = place;
        let told = match order.deadline {
            Some(deadline) => tokio::time::timeout_at(deadline, turn).await,
            None => Ok(turn.await),
        };
        match told {
            Ok(turn) => Ok(turn.unwrap_or(lane::Turn::Alone)),
            Err(_) => Err(in_vain(lane.is_unanswered(), wants, started)),
        }
    }

    /// How long to wait before a refused request is sent again, or the error if it is not.
    fn pause(
        &self,
        order: &Order,
        terms: Terms,
        (busy, waiters): (Error, bool),
        attempt: u32,
        elapsed: Duration,
    ) -> Result<Duration> {
        let Some(deadline) = order.deadline else { return Err(busy) };
        if !order.owner.is_of(self.client) {
            return Err(busy);
        }
        let incremental = terms.standing == Standing::Incremental;
        if !terms.re_enters && (!terms.retry || (incremental && waiters)) {
            let why = "waiting for more keys while holding some could deadlock";
            return Err(self.would_deadlock(order, why).with_source(busy));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        match order.retry.delay(attempt, fastrand::f64(), elapsed) {
            Some(delay) if delay < left => Ok(delay),
            _ => Err(timed_out(&busy, elapsed)),
        }
    }

    async fn ask_once(
        self: &Arc<Self>,
        order: &Order,
        terms: Terms,
        ask: Acquire,
        asking: &mut Asking,
    ) -> Result<Answer> {
        let (sent, lane) = (Instant::now(), asking.lane().cloned());
        let waiting = Arc::new(Waiting::new(ask.part.clone(), ask.lease, sent, lane));
        let listening = Job::Wait(Arc::clone(&waiting));
        self.schedule.put(ask.part.request, listening.clone(), None);
        let mut pending = Pending { service: self, waiting: &waiting, open: true };
        // A short wait is no reason to take a slow answer for an outage.
        let least = self.options.call_timeout / 10;
        let left = order.deadline.map(|at| at.saturating_duration_since(sent).max(least));
        let answer = self.call(left, self.backend.acquire(&ask)).await;
        let acquired = match answer {
            Ok(acquired) => acquired,
            // It may have happened, or may yet: `pending` cancels it.
            Err(error) if error.is_unavailable() => return Err(error),
            Err(error) => {
                pending.close();
                return Err(error);
            }
        };
        match acquired {
            Acquired::Granted(grant) => {
                let deadline = sent + order.lease.get() - order.lease.drift();
                let hold = self.start(order, terms, &ask.part, (grant, deadline, true), asking);
                pending.close();
                Ok(Answer::Held(hold))
            }
            Acquired::Queued { ask_again_in, .. } => {
                let at = Instant::now() + ask_again_in;
                self.schedule.again(ask.part.request, &listening, at);
                self.stand_in_line(order, terms, &mut pending, asking).await
            }
            Acquired::Busy { key, holders, waiters } => {
                pending.close();
                let by = match holders.first() {
                    Some(owner) => format!("held by owner {owner}"),
                    None => "others wait for it".to_owned(),
                };
                Ok(Answer::Busy(Error::new(ErrorKind::Busy, "acquire", by).with_key(key), waiters))
            }
            Acquired::Upgrade { key } => {
                pending.close();
                Err(self.upgrade(order, Want::new(key, Mode::Exclusive)))
            }
            Acquired::LimitReached { key } => {
                pending.close();
                let detail = format!("the owner has entered it {} times, its limit", order.limit);
                Err(Error::new(ErrorKind::LimitReached, "acquire", detail).with_key(key))
            }
            Acquired::Cancelled => {
                let detail = "the request was cancelled while it was under way";
                Err(Error::new(ErrorKind::Unavailable, "acquire", detail))
            }
        }
    }

    async fn stand_in_line(
        self: &Arc<Self>,
        order: &Order,
        terms: Terms,
        pending: &mut Pending<'_>,
        asking: &mut Asking,
    ) -> Result<Answer> {
        let started = Instant::now();
        let part = &pending.waiting.part;
        let turn = match order.deadline {
            Some(deadline) => tokio::time::timeout_at(deadline, pending.waiting.turn()).await,
            None => Ok(pending.waiting.turn().await),
        };
        match turn {
            Ok(Turn::Granted { grant, deadline, confirmed }) => {
                let hold = self.start(order, terms, part, (grant, deadline, confirmed), asking);
                pending.close();
                Ok(Answer::Held(hold))
            }
            Ok(Turn::Forgotten) => Ok(Answer::Forgotten),
            Err(_) => Err(in_vain(pending.waiting.is_unanswered(), &part.wants, started)),
        }
    }

    fn start(
        self: &Arc<Self>,
        order: &Order,
        terms: Terms,
        part: &Part,
        (grant, deadline, confirmed): (Grant, Instant, bool),
        asking: &mut Asking,
    ) -> Hold {
        let Grant { mut tokens, block, .. } = grant;
        let mut alias = terms.alias;
        let lane = asking.carrier.take().and_then(Carrier::granted);
        if let (Some(lane), Some(token)) = (&lane, tokens.first().copied()) {
            alias = Some(Alias { owner: lane.owner(), token, instead: token });
            lane.granted(order.owner, token, block);
        } else if let Some(alias) = alias {
            tokens = alias.correct(tokens);
        }
        let last = Instant::now() + order.max_hold;
        let state = Arc::clone(&order.state);
        let kept = Kept::new((part.clone(), order.lease, order.renews), (state, last), lane);
        if confirmed {
            kept.confirmed.cancel();
        }
        let (state, seat) = (Arc::clone(&order.state), asking.seat.take());
        let taker = Taker { owner: order.owner, state, alias, seat };
        Hold::start(Arc::clone(self), kept, tokens, deadline, taker)
    }

    fn upgrade(&self, order: &Order, want: Want) -> Error {
        let key = want.key.clone();
        let why = "the owner holds it shared; declare it exclusive from the start";
        self.would_deadlock(order, why).with_key(key)
    }

    /// Refuses, and names all keys that a new attempt has to declare: what the owner holds and what
    /// it asked for.
    fn would_deadlock(&self, order: &Order, why: &str) -> Error {
        let mut union = self.owners.held(order.owner);
        union.extend(order.wants.iter().map(|(_, want)| want.clone()));
        union.sort_by(|a, b| (&a.key, b.mode).cmp(&(&b.key, a.mode)));
        union.dedup_by(|b, a| a.key == b.key);
        let detail = format!("{why}; declare all keys together at the start");
        Error::new(ErrorKind::WouldDeadlock, "acquire", detail).with_declare(union)
    }
}

/// What became of one call.
enum Answer {
    Held(Hold),
    /// Refused; and whether others wait for the key.
    Busy(Error, bool),
    /// The service lost its memory while the request stood in line: ask anew.
    Forgotten,
}

/// A request that may be on its way, in line or granted without anybody knowing. Dropped open, it
/// is cancelled in the background.
struct Pending<'a> {
    service: &'a Service,
    waiting: &'a Waiting,
    open: bool,
}

impl Pending<'_> {
    /// Its fate is known and somebody else takes care of what is left.
    fn close(&mut self) {
        self.open = false;
        self.service.schedule.forget_wait(self.waiting.part.request);
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if self.open {
            let until = Instant::now() + self.waiting.lease.get();
            self.service.settle(self.waiting.part.clone(), true, until);
        }
    }
}

/// What was granted, if the lease has not been lost while the answer was on its way.
fn held(order: &Order, hold: Hold) -> Result<Hold> {
    if order.state.is_held() { Ok(hold) } else { Err(lost("acquire", hold.part())) }
}

/// The error of a request that was still in line when its time was over.
fn in_vain(unanswered: bool, wants: &[Want], since: Instant) -> Error {
    if unanswered {
        let detail = "the lock service stopped answering while the request stood in line";
        return Error::new(ErrorKind::Unavailable, "acquire", detail);
    }
    let busy = Error::new(ErrorKind::Busy, "acquire", "still in line");
    let key = wants.first().map(|want| want.key.clone());
    timed_out(&key.into_iter().fold(busy, Error::with_key), since.elapsed())
}

fn timed_out(busy: &Error, waited: Duration) -> Error {
    let detail = format!("waited {waited:.1?} in vain: {busy}");
    let error = Error::new(ErrorKind::TimedOut, "acquire", detail);
    match busy.key() {
        Some(key) => error.with_key(key.clone()),
        None => error,
    }
}

pub(super) fn closed() -> Error {
    Error::new(ErrorKind::Closed, "acquire", "this lock service was shut down")
}
