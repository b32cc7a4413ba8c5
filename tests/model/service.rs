//! Calls to the real [`Queue`](palisade::protocol::Queue), each answer checked against the
//! promises.
//!
//! Time is an event. Before a lease lapses, everybody else renews; then the clock moves just past
//! its deadline. Those renewals name no key, so that they look at nothing and find nothing.

use std::sync::Arc;

use palisade::protocol::{Acquired, Grant, Part, Renewal, Renewed, Standing};
use palisade::{Mode, OwnerId, Partition, RequestId};

use crate::world::{LEASE, MOST_KEYS, Promise, Request, State, World};

/// How far the clock moves with each call. A lease is many thousand ticks long, so that nothing
/// lapses but by [`State::lapse`].
const TICK_US: u64 = 2;

pub type Id = (OwnerId, RequestId);

/// One request as the service sees it, lapsed or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub id: Id,
    pub partition: usize,
    /// Holds its keys; else it stands in line.
    pub held: bool,
    pub live: bool,
    pub deadline_us: u64,
    /// Mode and token (0 in line) on each key.
    pub keys: [Option<(Mode, u64)>; MOST_KEYS],
}

impl Seen {
    pub fn on(&self, key: usize) -> Option<(Mode, u64)> {
        self.keys[key]
    }

    pub fn keys(&self) -> impl Iterator<Item = (usize, Mode, u64)> {
        let keys = self.keys.iter().enumerate();
        keys.filter_map(|(key, have)| have.map(|(mode, token)| (key, mode, token)))
    }

    /// Whether two requests of different owners want one key in modes that exclude each other.
    pub fn conflicts(&self, other: &Seen) -> bool {
        self.id.0 != other.id.0
            && self.keys().any(|(key, mode, _)| {
                other.on(key).is_some_and(|(theirs, _)| theirs.conflicts(mode))
            })
    }

    /// Whether this wants a key in a stronger mode than the other one.
    pub fn exceeds(&self, other: &Seen) -> bool {
        self.keys().any(|(key, mode, _)| other.on(key).is_some_and(|(theirs, _)| theirs < mode))
    }
}

impl State {
    /// Everything that the service knows. Asked at time zero, when nothing has lapsed yet,
    /// `inspect` shows lapsed entries too, and their deadlines as they are.
    pub fn look(&self, world: &World) -> Vec<Seen> {
        let mut all: Vec<Seen> = Vec::new();
        for (key, name) in world.names.iter().enumerate() {
            let partition = usize::from(world.partitions[key]);
            let there = self.queues[partition].inspect(0, name);
            let holders = there.holders.iter().map(|holder| {
                let id = (holder.owner, holder.request);
                (id, true, holder.mode, holder.token.get(), holder.expires_in)
            });
            let waiters = there.waiters.iter().map(|waiter| {
                ((waiter.owner, waiter.request), false, waiter.mode, 0, waiter.expires_in)
            });
            for (id, held, mode, token, expires_in) in holders.chain(waiters) {
                let deadline_us = u64::try_from(expires_in.as_micros()).unwrap();
                if let Some(known) = all.iter_mut().find(|known| known.id == id) {
                    known.keys[key] = Some((mode, token));
                    continue;
                }
                let live = deadline_us > self.now_us;
                let mut keys = [None; MOST_KEYS];
                keys[key] = Some((mode, token));
                all.push(Seen { id, partition, held, live, deadline_us, keys });
            }
        }
        all
    }

    /// Sends an acquire.
    pub fn acquire(&mut self, world: &World, request: &Request) -> Acquired {
        self.now_us += TICK_US;
        let before = self.look(world);
        let queue = &mut self.queues[request.partition()];
        let answer = queue.acquire(self.now_us, &request.ask).expect("a token can be given out");
        let once = queue.clone();
        let again = queue.acquire(self.now_us, &request.ask);
        // A second answer knows of one token.
        let same = match &answer {
            Acquired::Granted(first) => {
                again == Ok(Acquired::Granted(Grant { block: 1, ..first.clone() }))
            }
            other => again.as_ref() == Ok(other),
        };
        if !same || *queue != once {
            self.breaks(Promise::Resend);
        }
        self.judge(world, request, &before, &answer);
        answer
    }

    /// Checks what the answer alone can break.
    fn judge(&mut self, world: &World, request: &Request, before: &[Seen], answer: &Acquired) {
        let (owner, _) = request.id();
        // The state at the decision, after what had lapsed was cleared away.
        let after = self.look(world);
        let others = |seen: &&Seen| seen.held && seen.live && seen.id.0 != owner;
        let mine = |key: usize| {
            let entries = before.iter().filter(|seen| seen.held && seen.live && seen.id.0 == owner);
            entries.filter_map(|seen| seen.on(key)).max()
        };
        let re_enters = request
            .wishes
            .iter()
            .all(|wish| mine(wish.key).is_some_and(|(mode, _)| mode >= wish.mode));
        let known = before.iter().any(|seen| seen.id == request.id() && seen.live);
        match answer {
            Acquired::Granted(grant) => {
                let tokens: Vec<_> = grant.tokens.iter().map(|token| token.get()).collect();
                let had: Vec<_> =
                    request.wishes.iter().filter_map(|wish| Some(mine(wish.key)?.1)).collect();
                if re_enters && tokens != had {
                    self.breaks(Promise::ReEntry);
                }
            }
            Acquired::Cancelled | Acquired::LimitReached { .. } => {}
            _ if re_enters && !known => self.breaks(Promise::ReEntry),
            Acquired::Busy { .. } if request.terms.standing == Standing::Incremental => {
                let taken = request.wishes.iter().any(|wish| {
                    let mut theirs =
                        after.iter().filter(others).filter_map(|seen| seen.on(wish.key));
                    theirs.any(|(mode, _)| mode.conflicts(wish.mode))
                });
                if !taken {
                    self.breaks(Promise::Passes);
                }
            }
            _ => {}
        }
        if !matches!(answer, Acquired::Granted(_) | Acquired::Queued { .. }) {
            let nothing_lapsed = before.iter().all(|seen| seen.live);
            if after.iter().any(|seen| seen.id == request.id())
                || (nothing_lapsed && after != before)
            {
                self.breaks(Promise::Refusal);
            }
        }
    }

    /// Refreshes a request that waits, or renews one that is held.
    pub fn renew(&mut self, part: &Part, waiting: bool) -> Renewed {
        self.now_us += TICK_US;
        let renewal = Renewal { part: part.clone(), lease: *LEASE, waiting };
        let queue = &mut self.queues[usize::from(part.partition.0)];
        let answers = queue.renew(self.now_us, std::slice::from_ref(&renewal)).unwrap();
        let again = queue.clone().renew(self.now_us, &[renewal]).unwrap();
        if again != answers {
            self.breaks(Promise::Resend);
        }
        answers.into_iter().next().expect("one answer for one renewal")
    }

    pub fn release(&mut self, part: &Part) {
        self.now_us += TICK_US;
        let queue = &mut self.queues[usize::from(part.partition.0)];
        queue.release(self.now_us, part).expect("a token can be given out");
        let once = queue.clone();
        queue.release(self.now_us, part).expect("a token can be given out");
        if *queue != once {
            self.breaks(Promise::Resend);
        }
    }

    pub fn cancel(&mut self, part: &Part) {
        self.now_us += TICK_US;
        let queue = &mut self.queues[usize::from(part.partition.0)];
        queue.cancel(self.now_us, part).expect("a token can be given out");
        let once = queue.clone();
        queue.cancel(self.now_us, part).expect("a token can be given out");
        if *queue != once {
            self.breaks(Promise::Resend);
        }
    }

    /// The leases of these requests run out, and of nobody else.
    pub fn lapse(&mut self, world: &World, doomed: &[Id]) {
        self.now_us += TICK_US;
        let seen = self.look(world);
        let (ending, others): (Vec<Seen>, Vec<Seen>) =
            seen.into_iter().filter(|seen| seen.live).partition(|seen| doomed.contains(&seen.id));
        let Some(end) = ending.iter().map(|seen| seen.deadline_us).max() else { return };
        self.renew_silently(&others);
        self.now_us = end;
        self.renew_silently(&others);
    }

    fn renew_silently(&mut self, all: &[Seen]) {
        for seen in all {
            let (owner, request) = seen.id;
            let partition = Partition(u16::try_from(seen.partition).unwrap());
            let part = Part { partition, owner, request, wants: [].into() };
            let renewal = Renewal { part, lease: *LEASE, waiting: false };
            let renewed = self.queues[seen.partition].renew(self.now_us, &[renewal]).unwrap();
            assert_ne!(renewed, [Renewed::Lost], "it was alive");
        }
    }

    /// Somebody looks at every key.
    pub fn sweep(&mut self) {
        for queue in &mut self.queues {
            queue.sweep(self.now_us).expect("a token can be given out");
        }
    }

    pub fn breaks(&mut self, promise: Promise) {
        self.broken.get_or_insert(promise);
    }

    /// Compares the service before and after a step: who was granted something, and was it right?
    pub fn account(&mut self, world: &World, old: &State) {
        let before = Arc::clone(&old.seen);
        let after: Arc<[Seen]> = self.look(world).into();
        let was_held = |id: Id| before.iter().any(|seen| seen.id == id && seen.held);
        let mut granted: Vec<&Seen> =
            after.iter().filter(|seen| seen.held && !was_held(seen.id)).collect();
        granted.sort_by_key(|seen| seen.keys().map(|(_, _, token)| token).max());
        for grant in &granted {
            self.check_tokens(grant, &before, &after);
            self.check_line(grant, old, &before, &after);
        }
        for queue in &mut self.queues {
            queue.take_hand_overs();
            queue.take_followed();
        }
        let mut tickets = self.tickets;
        for client in &mut self.clients {
            for request in client.all_mut() {
                let id = request.id();
                let lost_its_place = before.iter().any(|seen| seen.id == id && !seen.live)
                    && after.iter().any(|seen| seen.id == id && seen.live);
                if lost_its_place {
                    request.ticket = None;
                }
                if !after.iter().any(|seen| seen.id == id && !seen.held) {
                    request.ticket = None;
                } else if request.ticket.is_none() {
                    tickets += 1;
                    request.ticket = Some(tickets);
                }
            }
        }
        self.tickets = tickets;
        self.seen = after;
    }

    /// A new right has a token above all that were given out for the key; re-entry keeps its token.
    fn check_tokens(&mut self, grant: &Seen, before: &[Seen], after: &[Seen]) {
        let block = self.find(grant.id).map_or(1, |request| request.ask.block);
        // An owner that holds one of the keys gets one token for the others.
        let all_new =
            grant.keys().all(|(_, _, token)| Some(token) == grant.keys().map(|k| k.2).max());
        for (key, mode, token) in grant.keys() {
            let own = |seen: &&Seen| seen.held && seen.id.0 == grant.id.0 && seen.id != grant.id;
            let live = |seen: &&Seen| seen.deadline_us > self.now_us;
            let mut had = before.iter().chain(after).filter(own).filter(live);
            let kept = had
                .any(|seen| seen.on(key).is_some_and(|(held, had)| had == token && held >= mode));
            if !kept && token <= self.reserved[key] {
                self.breaks(Promise::Token);
            }
            self.top[key] = self.top[key].max(token);
            let block = if kept || !all_new { 1 } else { block };
            self.reserved[key] = self.reserved[key].max(token + u64::from(block) - 1);
        }
    }

    /// A fresh request does not overtake an earlier fresh one that conflicts.
    fn check_line(&mut self, grant: &Seen, old: &State, before: &[Seen], after: &[Seen]) {
        let terms = self.find(grant.id).map(|request| request.terms);
        if terms.is_none_or(|terms| terms.standing != Standing::Fresh) {
            return;
        }
        let place = |id: Id| old.find(id).and_then(|request| request.ticket);
        let mine = place(grant.id).unwrap_or(u64::MAX);
        let own = |seen: &&Seen| seen.held && seen.id.0 == grant.id.0 && seen.id != grant.id;
        let holds = |key| before.iter().chain(after).filter(own).any(|seen| seen.on(key).is_some());
        let overtaken = after.iter().any(|seen| {
            let fresh = old.find(seen.id).is_some_and(|r| r.terms.standing == Standing::Fresh);
            let earlier = place(seen.id).is_some_and(|theirs| theirs < mine);
            let mut keys = grant.keys().filter(|(key, _, _)| !holds(*key));
            let whole = old.whole(seen);
            let wants_same = keys.any(|(key, mode, _)| {
                whole.on(key).is_some_and(|(theirs, _)| theirs.conflicts(mode))
            });
            let stood = before.iter().any(|was| was.id == seen.id && was.live);
            stood
                && !seen.held
                && seen.live
                && fresh
                && earlier
                && seen.id.0 != grant.id.0
                && wants_same
        });
        if overtaken {
            self.breaks(Promise::Line);
        }
    }
}
