//! One request at the service: how it is asked for, waited for, and taken over.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{Acquire, Acquired, Grant, Part, Standing};
use crate::types::{Mode, Partition, RequestId, Want};

use super::hold::{Hold, Kept, Taker, lost};
use super::lane::{self, Carrier, KeySet, Lane, Place, Seat, Way};
use super::owners::Alias;
use super::schedule::Job;
use super::service::{Order, Service, timed_out};
use super::wait::{Turn, Waiting};

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

/// For whom the service is asked.
#[derive(Default)]
pub(super) struct Asking {
    pub(super) carrier: Option<Carrier>,
    pub(super) seat: Option<Seat>,
}

impl Asking {
    pub(super) fn lane(&self) -> Option<&Arc<Lane>> {
        self.carrier.as_ref().and_then(Carrier::lane)
    }
}

/// What became of one call.
pub(super) enum Answer {
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

impl Service {
    pub(super) fn request(
        &self,
        order: &Order,
        partition: Partition,
        wants: &Arc<[Want]>,
        terms: Terms,
        asking: &Asking,
    ) -> Acquire {
        let lane = asking.lane();
        let alias = lane.map(|lane| lane.owner()).or(terms.alias.map(|alias| alias.owner));
        let (owner, request) = (alias.unwrap_or(order.owner), RequestId::next());
        Acquire {
            part: Part { partition, owner, request, wants: Arc::clone(wants) },
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
    pub(super) fn way(
        &self,
        order: &Order,
        partition: Partition,
        wants: &Arc<[Want]>,
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
            let set = KeySet { partition, lease: order.lease, wants: Arc::clone(wants) };
            self.lanes.enter(set, (order.owner, &order.state), rules)
        })
    }

    pub(super) async fn stand_in_lane(
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

    pub(super) async fn ask_once(
        self: &Arc<Self>,
        order: &Order,
        terms: Terms,
        ask: Acquire,
        asking: &mut Asking,
    ) -> Result<Answer> {
        let pass = self.vitals.admit()?;
        let (slept, sent) = (self.wakefulness.slept(), Instant::now());
        let lane = asking.lane().cloned();
        let waiting = Arc::new(Waiting::new(ask.part.clone(), ask.lease, sent, lane));
        let listening = Job::Wait(Arc::clone(&waiting));
        self.schedule.put(ask.part.request, listening.clone(), None);
        let mut pending = Pending { service: self, waiting: &waiting, open: true };
        // A short wait is no reason to take a slow answer for an outage.
        let least = self.options.call_timeout / 10;
        let left = order.deadline.map(|at| at.saturating_duration_since(sent).max(least));
        let limit = left.unwrap_or(Duration::MAX).min(self.options.call_timeout);
        let answer = pass.call(limit, self.backend.acquire(&ask)).await;
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
                let sent = self.wakefulness.sent(sent, slept);
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
