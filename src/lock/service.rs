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
use crate::protocol::{Acquire, Acquired, Admission, Backoff, Part, Standing};
use crate::types::{
    ClientId, FencingToken, Lease, LeaseState, Mode, OwnerId, Partition, RequestId, Want,
};

use super::LockOptions;
use super::hold::{Hold, Kept, lost};
use super::owners::{Entrance, Owners};
use super::schedule::{Job, Schedule};
use super::statistics::Counters;
use super::wait::{Turn, Waiting};

pub(super) struct Service {
    pub(super) backend: Arc<dyn LockBackend>,
    pub(super) client: ClientId,
    pub(super) options: LockOptions,
    pub(super) owners: Arc<Owners>,
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
            let Entrance::Open(admission, ticket) =
                self.owners.enter(self.client, order.owner, partition, &wants)
            else {
                let detail = "a store has rejected this owner's token; start over as a new owner";
                return Err(Error::new(ErrorKind::StaleToken, "acquire", detail));
            };
            let terms = match admission {
                Admission::Ask { standing, queue, retry } => {
                    Terms { standing, queue, retry, re_enters: ticket.is_none() }
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
        loop {
            let request = RequestId::next();
            let part = Part { partition, owner: order.owner, request, wants: wants.to_vec() };
            let ask = Acquire {
                part,
                client: self.client,
                lease: order.lease,
                standing: terms.standing,
                wait: terms.queue && order.deadline.is_some(),
                floor: order.floor,
                limit: order.limit,
                metadata: order.metadata.clone(),
            };
            let refusal = match self.ask_once(order, ask).await? {
                Answer::Held(hold) if order.state.is_held() => return Ok(Some(hold)),
                Answer::Held(hold) => return Err(lost("acquire", hold.part())),
                Answer::Forgotten if self.schedule.is_alive() => continue,
                Answer::Forgotten => return Err(closed()),
                Answer::Busy(error, waiters) => (error, waiters),
            };
            let pause = self.pause(order, terms, refusal, attempt, started.elapsed())?;
            tokio::time::sleep(pause).await;
            if terms.re_enters {
                return Ok(None);
            }
            attempt += 1;
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

    async fn ask_once(self: &Arc<Self>, order: &Order, ask: Acquire) -> Result<Answer> {
        let sent = Instant::now();
        let waiting = Arc::new(Waiting::new(ask.part.clone(), ask.lease, sent));
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
                let hold = self.start(order, &ask.part, grant.tokens, deadline, true);
                pending.close();
                Ok(Answer::Held(hold))
            }
            Acquired::Queued { ask_again_in, .. } => {
                let at = Instant::now() + ask_again_in;
                self.schedule.again(ask.part.request, &listening, at);
                self.stand_in_line(order, &mut pending).await
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
        pending: &mut Pending<'_>,
    ) -> Result<Answer> {
        let started = Instant::now();
        let part = &pending.waiting.part;
        let turn = match order.deadline {
            Some(deadline) => tokio::time::timeout_at(deadline, pending.waiting.turn()).await,
            None => Ok(pending.waiting.turn().await),
        };
        match turn {
            Ok(Turn::Granted { grant, deadline, confirmed }) => {
                let hold = self.start(order, part, grant.tokens, deadline, confirmed);
                pending.close();
                Ok(Answer::Held(hold))
            }
            Ok(Turn::Forgotten) => Ok(Answer::Forgotten),
            Err(_) if pending.waiting.is_unanswered() => {
                let detail = "the lock service stopped answering while the request stood in line";
                Err(Error::new(ErrorKind::Unavailable, "acquire", detail))
            }
            Err(_) => {
                let busy = Error::new(ErrorKind::Busy, "acquire", "still in line");
                let key = part.wants.first().map(|want| want.key.clone());
                let busy = key.into_iter().fold(busy, Error::with_key);
                Err(timed_out(&busy, started.elapsed()))
            }
        }
    }

    fn start(
        self: &Arc<Self>,
        order: &Order,
        part: &Part,
        tokens: Vec<FencingToken>,
        deadline: Instant,
        confirmed: bool,
    ) -> Hold {
        let token = CancellationToken::new();
        if confirmed {
            token.cancel();
        }
        let kept = Kept {
            part: part.clone(),
            lease: order.lease,
            state: Arc::clone(&order.state),
            renews: order.renews,
            last: Instant::now() + order.max_hold,
            confirmed: token,
        };
        Hold::start(Arc::clone(self), kept, tokens, deadline)
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
