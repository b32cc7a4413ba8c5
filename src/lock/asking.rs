//! One request at the service: how it is asked for, waited for, and taken over.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{Acquire, Acquired, Grant, Part, Standing};
use crate::types::{Mode, Partition, RequestId, Want};

use super::crowd::{Seat, Way};
use super::hold::{Hold, Kept, Taker, lost};
use super::lane::{Asks, BLOCK, KeySet, Lane, Place, Turn};
use super::owners::Alias;
use super::schedule::Job;
use super::service::{Order, Service, closed, timed_out};
use super::wait::{self, Waiting};

/// How one call for one part may go on.
#[derive(Clone, Copy)]
pub(super) struct Terms {
    pub(super) standing: Standing,
    pub(super) queue: bool,
    pub(super) retry: bool,
    pub(super) re_enters: bool,
    /// Under which name the service knows the owner, if not its own.
    pub(super) alias: Option<Alias>,
}

/// What became of one call.
pub(super) enum Answer {
    Held(Hold),
    /// Refused; and whether others wait for the key.
    Busy(Error, bool),
    /// The service lost its memory while the request stood in line: ask anew.
    Forgotten,
}

/// What the service made of a request.
enum Fate<'a> {
    Granted(Pending<'a>, Given),
    /// It lost its memory while the request stood in line.
    Forgotten,
    Refused(Acquired),
}

/// A grant, until when it lasts at least, and whether it is confirmed.
struct Given {
    grant: Grant,
    deadline: Instant,
    confirmed: bool,
}

/// A request that may be on its way, in line or granted without anybody knowing. Dropped open, it
/// is cancelled in the background.
struct Pending<'a> {
    service: &'a Service,
    waiting: Arc<Waiting>,
    open: bool,
}

impl Pending<'_> {
    fn part(&self) -> &Part {
        &self.waiting.part
    }

    /// Its fate is known and somebody else takes care of what is left.
    fn close(&mut self) {
        self.open = false;
        self.service.schedule.forget_wait(self.part().request);
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if self.open {
            let until = Instant::now() + self.waiting.lease.get();
            self.service.settle(self.part().clone(), true, until);
        }
    }
}

/// A lane that is asked for. However that ends, whoever still waits for it then asks alone.
struct Errand(Arc<Lane>);

impl Drop for Errand {
    fn drop(&mut self) {
        self.0.disband(|| Turn::Alone);
    }
}

impl Service {
    pub(super) fn request(
        &self,
        order: &Order,
        partition: Partition,
        wants: &Arc<[Want]>,
        terms: Terms,
    ) -> Acquire {
        let owner = terms.alias.map_or(order.owner, |alias| alias.owner);
        let (request, wants) = (RequestId::next(), Arc::clone(wants));
        Acquire {
            part: Part { partition, owner, request, wants },
            client: self.client,
            lease: order.lease,
            standing: terms.standing,
            wait: terms.queue && order.deadline.is_some(),
            floor: order.floor,
            limit: order.limit,
            block: 1,
            metadata: order.metadata.clone(),
        }
    }

    /// How a request goes on that may share a place in line with others of this process: one that
    /// waits for exclusive keys in one partition, as an owner that nobody else knows. `None` for
    /// any other.
    pub(super) fn way(
        &self,
        order: &Order,
        partition: Partition,
        wants: &Arc<[Want]>,
        terms: Terms,
    ) -> Option<Way> {
        let (enabled, pushes) =
            (self.options.hand_over.enabled, self.backend.capabilities().pushes);
        let deadline = order.deadline.filter(|_| terms.queue)?;
        let own = order.renews && !order.lent && terms.standing == Standing::Fresh;
        let plain = order.metadata.is_none() && order.floor.is_none() && order.limit > 0;
        let whole = wants.len() == order.wants.len();
        let exclusive = || wants.iter().all(|want| want.mode == Mode::Exclusive);
        (enabled && pushes && own && plain && whole && exclusive()).then(|| {
            let set = KeySet { partition, lease: order.lease, wants: Arc::clone(wants) };
            let (owner, state) = (order.owner, Arc::clone(&order.state));
            self.crowds.enter(set, Asks { owner, state, deadline })
        })
    }

    /// Waits for the turn of a request that has a place among those of this process.
    pub(super) async fn stand_in_lane(
        &self,
        order: &Order,
        wants: &[Want],
        mut place: Place,
    ) -> Result<Turn> {
        let started = Instant::now();
        let _waits = self.counters.waits();
        let told = match order.deadline {
            Some(deadline) => tokio::time::timeout_at(deadline, place.turn()).await,
            None => Ok(place.turn().await),
        };
        match told {
            Ok(Some(turn)) => Ok(turn),
            // It was passed over because its time is over, or because nobody asks any more.
            Ok(None) if order.deadline.is_none_or(|at| Instant::now() < at) => Ok(Turn::Alone),
            Ok(None) | Err(_) => {
                Err(in_vain(place.is_unanswered(self.least_call()), wants, started))
            }
        }
    }

    /// Asks the service for a lane, for as long as anybody waits for it.
    pub(super) fn carry(self: Arc<Self>, lane: Arc<Lane>) -> impl Future<Output = ()> + Send {
        // Not within the future, which is dropped unpolled when its runtime is shut down.
        let errand = Errand(lane);
        async move {
            let Errand(lane) = &errand;
            let answer = tokio::select! {
                biased;
                () = self.closing.cancelled() => return,
                answer = self.ask_for(lane) => answer,
                () = lane.deserted() => return,
            };
            if let Err(error) = answer {
                let error = Arc::new(error);
                lane.disband(|| Turn::Failed(Arc::clone(&error)));
            }
        }
    }

    async fn ask_for(self: &Arc<Self>, lane: &Arc<Lane>) -> Result<()> {
        loop {
            if !self.schedule.is_alive() {
                return Err(closed());
            }
            let (KeySet { partition, lease, wants }, request) =
                (lane.set().clone(), RequestId::next());
            let ask = Acquire {
                part: Part { partition, owner: lane.owner(), request, wants },
                client: self.client,
                lease,
                standing: Standing::Fresh,
                wait: true,
                floor: None,
                limit: 1,
                block: BLOCK,
                metadata: None,
            };
            match self.stand(&ask, None, Some(lane)).await? {
                Fate::Granted(pending, given) => {
                    self.hand_out(lane, pending, given);
                    return Ok(());
                }
                Fate::Forgotten => {}
                // What waits as a fresh owner is not refused. If it is, each may ask why.
                Fate::Refused(_) => return Ok(()),
            }
        }
    }

    /// Gives what a lane was granted to the first who waits. If nobody is left, it is cancelled.
    fn hand_out(self: &Arc<Self>, lane: &Arc<Lane>, mut pending: Pending<'_>, given: Given) {
        let Given { grant, deadline, confirmed } = given;
        let Some(first) = grant.tokens.first().copied() else { return };
        let Some(waiter) = lane.granted(first, grant.block) else { return };
        let (part, lease) = (pending.part().clone(), pending.waiting.lease);
        // Whoever takes it in hand has it renewed for longer.
        let last = Instant::now() + lease.get();
        let state = Arc::clone(&waiter.state);
        let lane = Some(Arc::clone(lane));
        let kept = Kept::new((part, lease, true), (Arc::clone(&state), last), lane);
        if confirmed {
            kept.confirm();
        }
        let alias = Alias { owner: kept.part.owner, token: first, instead: first };
        let taker = Taker { owner: waiter.owner, state, alias: Some(alias), seat: None };
        let hold = Hold::start(Arc::clone(self), kept, grant.tokens, deadline, taker);
        pending.close();
        waiter.tell(Turn::Held(hold));
    }

    /// A short wait is no reason to take a slow answer for an outage.
    fn least_call(&self) -> Duration {
        self.options.call_timeout / 10
    }

    /// Sends a request and waits in line for it, for a lane or for whoever asks.
    async fn stand(
        &self,
        ask: &Acquire,
        until: Option<Instant>,
        lane: Option<&Arc<Lane>>,
    ) -> Result<Fate<'_>> {
        let pass = self.vitals.admit()?;
        let (slept, sent) = (self.wakefulness.slept(), Instant::now());
        let waiting = Arc::new(Waiting::new(ask.part.clone(), ask.lease, sent, lane.cloned()));
        let listening = Job::Wait(Arc::clone(&waiting));
        self.schedule.put(ask.part.request, listening.clone(), None);
        let mut pending = Pending { service: self, waiting, open: true };
        let left = until.map(|at| at.saturating_duration_since(sent).max(self.least_call()));
        if let Some(lane) = lane {
            lane.asked(true);
        }
        let limit = left.unwrap_or(Duration::MAX).min(self.options.call_timeout);
        let answer = pass.call(limit, self.backend.acquire(ask)).await;
        if let Some(lane) = lane.filter(|_| answer.is_ok()) {
            lane.asked(false);
        }
        match answer {
            Ok(Acquired::Granted(grant)) => {
                let sent = self.wakefulness.sent(sent, slept);
                let deadline = sent + ask.lease.get() - ask.lease.drift();
                Ok(Fate::Granted(pending, Given { grant, deadline, confirmed: true }))
            }
            Ok(Acquired::Queued { ask_again_in, .. }) => {
                let at = Instant::now() + ask_again_in;
                self.schedule.again(ask.part.request, &listening, at);
                let _waits = lane.is_none().then(|| self.counters.waits());
                stand_in_line(pending, until).await
            }
            Ok(Acquired::Cancelled) => {
                let detail = "the request was cancelled while it was under way";
                Err(Error::new(ErrorKind::Unavailable, "acquire", detail))
            }
            Ok(refused) => {
                pending.close();
                Ok(Fate::Refused(refused))
            }
            // It may have happened, or may yet: `pending` cancels it.
            Err(error) if error.is_unavailable() => Err(error),
            Err(error) => {
                pending.close();
                Err(error)
            }
        }
    }

    pub(super) async fn ask_once(
        self: &Arc<Self>,
        order: &Order,
        terms: Terms,
        ask: Acquire,
        seat: &mut Option<Seat>,
    ) -> Result<Answer> {
        let refused = match self.stand(&ask, order.deadline, None).await? {
            Fate::Granted(mut pending, given) => {
                let hold = self.start(order, terms, pending.part(), given, seat.take());
                pending.close();
                return Ok(Answer::Held(hold));
            }
            Fate::Forgotten => return Ok(Answer::Forgotten),
            Fate::Refused(refused) => refused,
        };
        match refused {
            Acquired::Busy { key, holders, waiters } => {
                let by = match holders.first() {
                    Some(owner) if owner.is_group() => {
                        format!("held by owner {owner}, a group of waiters of one process")
                    }
                    Some(owner) => format!("held by owner {owner}"),
                    None => "others wait for it".to_owned(),
                };
                Ok(Answer::Busy(Error::new(ErrorKind::Busy, "acquire", by).with_key(key), waiters))
            }
            Acquired::Upgrade { key } => Err(self.upgrade(order, Want::new(key, Mode::Exclusive))),
            Acquired::LimitReached { key } => {
                let detail = format!("the owner has entered it {} times, its limit", order.limit);
                Err(Error::new(ErrorKind::LimitReached, "acquire", detail).with_key(key))
            }
            // These are no refusals.
            Acquired::Granted(_) | Acquired::Queued { .. } | Acquired::Cancelled => {
                Ok(Answer::Forgotten)
            }
        }
    }

    fn start(
        self: &Arc<Self>,
        order: &Order,
        terms: Terms,
        part: &Part,
        given: Given,
        seat: Option<Seat>,
    ) -> Hold {
        let Given { grant, deadline, confirmed } = given;
        let tokens = match terms.alias {
            Some(alias) => alias.correct(grant.tokens),
            None => grant.tokens,
        };
        let last = Instant::now() + order.max_hold;
        let state = Arc::clone(&order.state);
        let kept = Kept::new((part.clone(), order.lease, order.renews), (state, last), None);
        if confirmed {
            kept.confirm();
        }
        let state = Arc::clone(&order.state);
        let taker = Taker { owner: order.owner, state, alias: terms.alias, seat };
        Hold::start(Arc::clone(self), kept, tokens, deadline, taker)
    }
}

async fn stand_in_line(pending: Pending<'_>, until: Option<Instant>) -> Result<Fate<'_>> {
    let started = Instant::now();
    let turn = match until {
        Some(until) => tokio::time::timeout_at(until, pending.waiting.turn()).await,
        None => Ok(pending.waiting.turn().await),
    };
    match turn {
        Ok(wait::Turn::Granted { grant, deadline, confirmed }) => {
            Ok(Fate::Granted(pending, Given { grant, deadline, confirmed }))
        }
        Ok(wait::Turn::Forgotten) => Ok(Fate::Forgotten),
        Err(_) => {
            let unanswered = pending.waiting.is_unanswered();
            Err(in_vain(unanswered, &pending.part().wants, started))
        }
    }
}

/// The error of a request in whose stead another one asked.
pub(super) fn instead(error: &Arc<Error>) -> Error {
    let detail = "the service was asked for several requests of this process at once, in vain";
    let own = Error::new(error.kind(), "acquire", detail).with_source(Arc::clone(error));
    let own = error.retry_after().into_iter().fold(own, Error::with_retry_after);
    match error.key() {
        Some(key) => own.with_key(key.clone()),
        None => own,
    }
}

/// What was granted, if the lease has not been lost while the answer was on its way.
pub(super) fn held(order: &Order, hold: Hold) -> Result<Hold> {
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
