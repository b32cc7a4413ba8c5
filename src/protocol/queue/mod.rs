//! The lock queue of one partition: who holds what, who waits, and who is next.
//!
//! This is the reference for every lock service: the memory backend is this type behind a mutex,
//! and the scripts of the others must answer the same.
//!
//! The grant rule. A request that only re-enters is granted at once, past everybody, with the
//! tokens its owner has. A *fresh* request is granted when no other owner holds a conflicting mode
//! on any of its keys and no earlier conflicting waiter stands in line on any of them; else it
//! joins the line on all of its keys and keeps its place. An *incremental* request passes the line,
//! and is granted or refused. Every release, lapse and cancel promotes in the same step, looking
//! past blocked waiters. Shared never becomes exclusive in place: a waiter whose owner came to hold
//! one of its keys in a weaker mode meanwhile waits until that entry has gone.
//!
//! A grant may reserve a block of tokens, for a client that passes it on among its own waiters. A
//! request that stands in line behind another one makes it *followed*, so that the other's client
//! knows that it is not alone.
//!
//! A lapse has no timer: it is found by whoever looks at the key next. Waiters refresh, so somebody
//! looks.

mod promote;
mod rules;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::types::{ClientId, FencingToken, Lease, Mode, OwnerId, RequestId, ResourceKey, Want};

use super::Standing;
use super::request::{
    Acquire, Acquired, Grant, Holder, Inspection, Part, Released, Renewal, Renewed, Waiter,
};
use super::token::{Corrupt, next_token};

pub use rules::Rules;

/// How long a cancelled request is remembered, so that a late copy of it is not granted.
pub const TOMBSTONE: Duration = Duration::from_secs(30);

type Id = (OwnerId, RequestId);

/// A grant to tell somebody who waited for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandOver {
    /// Where the waiter listens.
    pub client: ClientId,
    /// Who waited.
    pub owner: OwnerId,
    /// What it was granted.
    pub grant: Grant,
}

/// A request stands in line directly behind this one: news for whoever passes its grant on among
/// its own waiters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Followed {
    /// Where the client of the request listens.
    pub client: ClientId,
    /// Who holds or waits there.
    pub owner: OwnerId,
    /// By which request.
    pub request: RequestId,
}

/// The state of one partition. Times are microseconds of the service's clock.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Queue {
    rules: Rules,
    last: Option<FencingToken>,
    tickets: u64,
    keys: BTreeMap<ResourceKey, Slot>,
    held: BTreeMap<Id, Held>,
    waiting: BTreeMap<Id, Waiting>,
    /// Until when the request stays cancelled.
    cancelled: BTreeMap<Id, u64>,
    handed_over: Vec<(ClientId, Id, u32)>,
    followed: Vec<Id>,
}

/// What stands at one key: requests that hold it, in the order of their grants, and the line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Slot {
    entries: Vec<(Id, Mode)>,
    line: Vec<(Id, Mode)>,
}

/// How a request is to be held.
struct Granted<'a> {
    deadline_us: u64,
    floor: Option<FencingToken>,
    block: u32,
    metadata: &'a Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Held {
    wants: Arc<[Want]>,
    tokens: Vec<FencingToken>,
    deadline_us: u64,
    metadata: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Waiting {
    wants: Arc<[Want]>,
    ticket: u64,
    since_us: u64,
    deadline_us: u64,
    lease: Lease,
    client: ClientId,
    standing: Standing,
    floor: Option<FencingToken>,
    block: u32,
    metadata: Option<String>,
}

impl Queue {
    /// An empty partition with loosened rules, to see a checker catch them.
    #[must_use]
    pub fn loosened(rules: Rules) -> Self {
        Self { rules, ..Self::default() }
    }

    /// Answers a request for all keys of a set.
    ///
    /// # Errors
    /// [`Corrupt`] when no token can be given out; nothing is changed then.
    pub fn acquire(&mut self, now_us: u64, ask: &Acquire) -> Result<Acquired, Corrupt> {
        let id = (ask.part.owner, ask.part.request);
        next_token(self.last, now_us, ask.floor)?;
        self.prune(now_us, &ask.part.wants)?;
        if self.cancelled.get(&id).is_some_and(|until| *until > now_us) {
            return Ok(Acquired::Cancelled);
        }
        if let Some(held) = self.held.get_mut(&id) {
            // Whoever asks again counts a whole lease from its first asking. If the first copy was
            // queued and then handed over, there is only a claim.
            held.deadline_us = held.deadline_us.max(now_us + micros(ask.lease.get()));
            let tokens = held.tokens.clone();
            return Ok(Acquired::Granted(Grant { request: id.1, tokens, block: 1 }));
        }
        if self.waiting.contains_key(&id) {
            return Ok(self.queued(now_us, id));
        }
        if let Some(refusal) = self.refusal(now_us, ask) {
            return Ok(refusal);
        }
        if let Some(key) = self.blocked_on(now_us, ask) {
            let queues = ask.standing == Standing::Fresh || self.rules.incremental_waits;
            if !(ask.wait && queues) {
                return Ok(self.busy(now_us, id.0, key));
            }
            self.join_line(now_us, ask);
            return Ok(self.queued(now_us, id));
        }
        let deadline_us = now_us + micros(ask.lease.get());
        let block = if ask.standing == Standing::Fresh { ask.block } else { 1 };
        let terms = Granted { deadline_us, floor: ask.floor, block, metadata: &ask.metadata };
        let (tokens, block) = self.hold(now_us, id, &ask.part.wants, terms)?;
        Ok(Acquired::Granted(Grant { request: id.1, tokens, block }))
    }

    /// Keeps requests alive, held or queued, each for itself.
    ///
    /// # Errors
    /// [`Corrupt`] when a waiter is next and no token can be given out.
    pub fn renew(&mut self, now_us: u64, renewals: &[Renewal]) -> Result<Vec<Renewed>, Corrupt> {
        renewals.iter().map(|renewal| self.renew_one(now_us, renewal)).collect()
    }

    fn renew_one(&mut self, now_us: u64, renewal: &Renewal) -> Result<Renewed, Corrupt> {
        let id = (renewal.part.owner, renewal.part.request);
        if let Some(waiting) = self.waiting.get_mut(&id)
            && waiting.deadline_us > now_us
        {
            waiting.deadline_us = now_us + micros(waiting.lease.waiter());
        }
        self.prune(now_us, &renewal.part.wants)?;
        self.promote(now_us, keys(&renewal.part.wants))?;
        if let Some(held) = self.held.get_mut(&id) {
            held.deadline_us = held.deadline_us.max(now_us + micros(renewal.lease.get()));
            // Whoever was let in by this very call may hear of it by the answer before the push.
            let told = self.handed_over.iter().rev().find(|(_, other, _)| *other == id);
            let block = told.map_or(1, |(.., block)| *block);
            let grant = Grant { request: id.1, tokens: held.tokens.clone(), block };
            return Ok(Renewed::Held(renewal.waiting.then_some(grant)));
        }
        if self.waiting.contains_key(&id) {
            self.follow(now_us, id);
            let ask_again_in = self.ask_again_in(now_us, id);
            return Ok(Renewed::Queued { ask_again_in });
        }
        Ok(Renewed::Lost)
    }

    /// Gives up what a request holds, and promotes.
    ///
    /// # Errors
    /// [`Corrupt`] when a waiter is next and no token can be given out; the release has happened.
    pub fn release(&mut self, now_us: u64, part: &Part) -> Result<Released, Corrupt> {
        let id = (part.owner, part.request);
        let live = self.held.get(&id).is_some_and(|held| held.deadline_us > now_us);
        let mut dirty = self.remove(id);
        if self.rules.promotes_on_last_entry_only {
            dirty.retain(|key| self.strongest(now_us, id.0, key).is_none());
        }
        self.promote(now_us, dirty)?;
        Ok(if live { Released::Released } else { Released::Gone })
    }

    /// Ends a request whatever became of it, and remembers that for [`TOMBSTONE`].
    ///
    /// # Errors
    /// [`Corrupt`] when a waiter is next and no token can be given out; the request is gone.
    pub fn cancel(&mut self, now_us: u64, part: &Part) -> Result<(), Corrupt> {
        let id = (part.owner, part.request);
        self.cancelled.insert(id, now_us + micros(TOMBSTONE));
        let dirty = self.remove(id);
        if self.rules.cancel_does_not_promote {
            return Ok(());
        }
        self.promote(now_us, dirty)
    }

    /// Shows who holds a key and who waits for it.
    #[must_use]
    pub fn inspect(&self, now_us: u64, key: &ResourceKey) -> Inspection {
        let Some(slot) = self.keys.get(key) else { return Inspection::default() };
        let holders = slot.entries.iter().filter_map(|(id, mode)| {
            let held = self.held.get(id).filter(|held| held.deadline_us > now_us)?;
            let token = self.token_on(*id, key)?;
            Some(Holder {
                owner: id.0,
                request: id.1,
                mode: *mode,
                token,
                held_for: Duration::from_micros(now_us.saturating_sub(token.get())),
                expires_in: Duration::from_micros(held.deadline_us - now_us),
                metadata: held.metadata.clone(),
            })
        });
        let waiters = slot.line.iter().filter_map(|(id, mode)| {
            let waiting = self.waiting.get(id).filter(|waiting| waiting.deadline_us > now_us)?;
            Some(Waiter {
                owner: id.0,
                request: id.1,
                mode: *mode,
                waiting_for: Duration::from_micros(now_us.saturating_sub(waiting.since_us)),
                expires_in: Duration::from_micros(waiting.deadline_us - now_us),
                metadata: waiting.metadata.clone(),
            })
        });
        Inspection { holders: holders.collect(), waiters: waiters.collect() }
    }

    /// Takes the grants that were handed to waiters since the last call. Those that have ended
    /// meanwhile are left out.
    pub fn take_hand_overs(&mut self) -> Vec<HandOver> {
        let handed = std::mem::take(&mut self.handed_over);
        let tell = handed.into_iter().filter_map(|(client, (owner, request), block)| {
            let tokens = self.held.get(&(owner, request))?.tokens.clone();
            Some(HandOver { client, owner, grant: Grant { request, tokens, block } })
        });
        tell.collect()
    }

    /// Takes the requests behind which somebody was found to stand since the last call.
    pub fn take_followed(&mut self) -> Vec<Followed> {
        let followed = std::mem::take(&mut self.followed);
        let tell = |(owner, request): Id| Followed { client: owner.client(), owner, request };
        followed.into_iter().map(tell).collect()
    }

    /// Removes everything that has lapsed, on every key, so that nothing stays for ever on keys
    /// that nobody asks for again, and forgets requests that were cancelled [`TOMBSTONE`] ago.
    ///
    /// # Errors
    /// [`Corrupt`] when a waiter is next and no token can be given out.
    pub fn sweep(&mut self, now_us: u64) -> Result<(), Corrupt> {
        let wants: Vec<Want> =
            self.keys.keys().map(|key| Want::new(key.clone(), Mode::Exclusive)).collect();
        self.cancelled.retain(|_, until| *until > now_us);
        self.prune(now_us, &wants)
    }

    /// Whether nobody holds or waits for anything.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.keys.is_empty() && self.held.is_empty() && self.waiting.is_empty()
    }

    /// What refuses a request for good: an upgrade, or too many entries.
    fn refusal(&self, now_us: u64, ask: &Acquire) -> Option<Acquired> {
        ask.part.wants.iter().find_map(|want| {
            let have = self.strongest(now_us, ask.part.owner, &want.key)?;
            let key = want.key.clone();
            if have < want.mode && !self.rules.upgrade_waits {
                return Some(Acquired::Upgrade { key });
            }
            let entries = self.keys.get(&want.key).map_or(0, |slot| {
                slot.entries.iter().filter(|((owner, _), _)| *owner == ask.part.owner).count()
            });
            (entries >= usize::try_from(ask.limit).unwrap_or(usize::MAX))
                .then_some(Acquired::LimitReached { key })
        })
    }

    fn busy(&self, now_us: u64, owner: OwnerId, key: ResourceKey) -> Acquired {
        let slot = self.keys.get(&key);
        let mut holders: Vec<OwnerId> = slot
            .into_iter()
            .flat_map(|slot| &slot.entries)
            .filter(|(id, _)| id.0 != owner && self.is_live(now_us, *id))
            .map(|(id, _)| id.0)
            .collect();
        holders.dedup();
        let waiters = slot.is_some_and(|slot| !slot.line.is_empty());
        Acquired::Busy { key, holders, waiters }
    }

    fn queued(&mut self, now_us: u64, id: Id) -> Acquired {
        self.follow(now_us, id);
        let wants = self.waiting.get(&id).map(|waiting| &*waiting.wants);
        let before = wants.unwrap_or_default().iter().map(|want| {
            let line = self.keys.get(&want.key).map(|slot| slot.line.as_slice());
            line.unwrap_or_default().iter().take_while(|(other, _)| *other != id).count()
        });
        let position = u32::try_from(before.max().unwrap_or(0)).unwrap_or(u32::MAX);
        Acquired::Queued { position, ask_again_in: self.ask_again_in(now_us, id) }
    }

    /// Notes which requests stand directly before this one: on each key the waiter before it or,
    /// for the first in line, those who hold the key alone. Each refresh notes it again, because
    /// the notice may be lost. Those who share a key pass nothing on.
    fn follow(&mut self, now_us: u64, id: Id) {
        let Some(waiting) = self.waiting.get(&id) else { return };
        let mut before: Vec<Id> = Vec::new();
        for slot in waiting.wants.iter().filter_map(|want| self.keys.get(&want.key)) {
            let ahead = slot.line.iter().take_while(|(other, _)| *other != id).last();
            let holders = slot.entries.iter().filter(|_| ahead.is_none());
            let found = ahead.into_iter().chain(holders);
            let alone = found.filter(|(other, mode)| {
                *mode == Mode::Exclusive && other.0 != id.0 && self.is_live(now_us, *other)
            });
            before.extend(alone.map(|(other, _)| *other));
        }
        for other in before {
            if !self.followed.contains(&other) {
                self.followed.push(other);
            }
        }
    }

    /// One refresh interval, or sooner for a waiter at a front: when the last lease that is in its
    /// way may lapse.
    fn ask_again_in(&self, now_us: u64, id: Id) -> Duration {
        let Some(waiting) = self.waiting.get(&id) else { return Duration::ZERO };
        let refresh = waiting.lease.refresh();
        let ends = waiting.wants.iter().filter_map(|want| {
            let slot = self.keys.get(&want.key)?;
            let first = slot.line.first().is_some_and(|(other, _)| *other == id);
            let entries = slot.entries.iter().filter(|_| first);
            entries.filter_map(|(other, _)| self.held.get(other)).map(|held| held.deadline_us).max()
        });
        match ends.max() {
            Some(end) => refresh.min(Duration::from_micros(end.saturating_sub(now_us) + 1_000)),
            None => refresh,
        }
    }

    fn join_line(&mut self, now_us: u64, ask: &Acquire) {
        let id = (ask.part.owner, ask.part.request);
        self.tickets += 1;
        let lines = if self.rules.first_key_only { 1 } else { ask.part.wants.len() };
        for want in ask.part.wants.iter().take(lines) {
            self.keys.entry(want.key.clone()).or_default().line.push((id, want.mode));
        }
        self.waiting.insert(
            id,
            Waiting {
                wants: Arc::clone(&ask.part.wants),
                ticket: self.tickets,
                since_us: now_us,
                deadline_us: now_us + micros(ask.lease.waiter()),
                lease: ask.lease,
                client: ask.client,
                standing: ask.standing,
                floor: ask.floor,
                block: if ask.standing == Standing::Fresh { ask.block } else { 1 },
                metadata: ask.metadata.clone(),
            },
        );
    }
}

fn keys(wants: &[Want]) -> Vec<ResourceKey> {
    wants.iter().map(|want| want.key.clone()).collect()
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
