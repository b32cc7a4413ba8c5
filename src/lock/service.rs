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
use crate::protocol::{Admission, Backoff, Standing};
use crate::types::{ClientId, FencingToken, Lease, LeaseState, OwnerId, Partition, Want};

use super::LockOptions;
use super::asking::{Answer, Terms, held, instead};
use super::crowd::{Crowds, Way};
use super::hold::Hold;
use super::lane::Turn;
use super::owners::{Entrance, Owners};
use super::schedule::Schedule;
use super::statistics::Counters;
use super::vitals::Vitals;
use super::wakefulness::Wakefulness;

pub(super) struct Service {
    pub(super) backend: Arc<dyn LockBackend>,
    pub(super) client: ClientId,
    pub(super) options: LockOptions,
    pub(super) owners: Arc<Owners>,
    pub(super) crowds: Arc<Crowds>,
    pub(super) schedule: Arc<Schedule>,
    pub(super) counters: Arc<Counters>,
    pub(super) vitals: Arc<Vitals>,
    pub(super) wakefulness: Arc<Wakefulness>,
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
        self.vitals.check()?;
        // Almost every request is one part.
        let mut holds = Vec::with_capacity(1);
        for part in order.wants.chunk_by(|(a, _), (b, _)| a == b) {
            let Some((partition, _)) = part.first() else { continue };
            let wants: Arc<[Want]> = part.iter().map(|(_, want)| want.clone()).collect();
            self.enter(order, *partition, wants, &mut holds).await?;
        }
        Ok(holds)
    }

    /// Asks the books, then the service, for the keys of one partition.
    async fn enter(
        self: &Arc<Self>,
        order: &Order,
        partition: Partition,
        wants: Arc<[Want]>,
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
                    todo.extend([new.into(), held.into()]);
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
        wants: &Arc<[Want]>,
        terms: Terms,
    ) -> Result<Option<Hold>> {
        let started = Instant::now();
        let mut attempt = 0;
        let mut seat = None;
        match self.way(order, partition, wants, terms) {
            Some(Way::Alone(taken)) => seat = Some(taken),
            Some(Way::Join(place)) => match self.stand_in_lane(order, wants, place).await? {
                Turn::Held(hold) => {
                    return held(order, hold.taken(order.max_hold)).map(Some);
                }
                Turn::Failed(error) => return Err(instead(&error)),
                Turn::Alone => {}
            },
            None => {}
        }
        loop {
            if !self.schedule.is_alive() {
                return Err(closed());
            }
            let ask = self.request(order, partition, wants, terms);
            let refusal = match self.ask_once(order, terms, ask, &mut seat).await? {
                Answer::Held(hold) => return held(order, hold).map(Some),
                Answer::Forgotten => continue,
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

    pub(super) fn upgrade(&self, order: &Order, want: Want) -> Error {
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

pub(super) fn timed_out(busy: &Error, waited: Duration) -> Error {
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
