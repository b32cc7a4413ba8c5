//! Draining: from here on nobody asks for anything new. Does everyone get its turn, and leave
//! nothing?

use crate::service::{Id, Seen};
use crate::world::{Phase, State, World};

/// What draining a state gave.
// exhaustive: the tests of this model match on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    Empty,
    /// Somebody waits for ever.
    Deadlock,
    /// All have gone, and the service still knows something.
    Leak,
}

impl State {
    pub fn drained(&self, world: &World) -> Drained {
        *self.drained.get_or_init(|| self.clone().drain(world))
    }

    /// Messages arrive, the dead lapse, whoever waits goes on waiting with its refreshes, and
    /// whoever does not wait releases what it holds.
    fn drain(mut self, world: &World) -> Drained {
        let mut lapsed = self.seen.iter().any(|seen| !seen.live);
        for client in &mut self.clients {
            client.all_mut().for_each(|request| request.copy = false);
        }
        loop {
            self.encode(world);
            let before = self.code;
            lapsed |= self.bury(world);
            for client in 0..self.clients.len() {
                self.settle(client);
                self.wait_on(world, client);
                if self.may_release(world, client) {
                    while !self.clients[client].orders.is_empty() {
                        self.fail(world, (client, 0));
                    }
                    self.settle(client);
                }
            }
            self.account(world, &self.clone());
            self.tidy();
            self.encode(world);
            if self.code == before {
                break;
            }
        }
        if self.clients.iter().any(|client| !client.orders.is_empty()) {
            return Drained::Deadlock;
        }
        if lapsed {
            self.sweep();
        }
        let idle = self.queues.iter().all(|queue| queue.is_idle());
        if idle { Drained::Empty } else { Drained::Leak }
    }

    /// Whoever waits holds on to what it has, and so does a process while another one waits to
    /// which it passed its owner's id.
    fn may_release(&self, world: &World, client: usize) -> bool {
        let me = world.processes[client];
        let all = self.clients.iter().zip(&world.processes).enumerate();
        let mut concern = all.filter(|(at, (_, other))| {
            *at == client || (me.local && !other.local && other.owner == me.owner)
        });
        concern.all(|(_, (client, _))| client.orders.iter().all(|order| order.is_complete()))
    }

    /// What nobody cares for any more lapses.
    fn bury(&mut self, world: &World) -> bool {
        let seen = self.look(world);
        let gone = self.all().filter(|(_, request)| request.phase == Phase::Gone);
        let ids: Vec<Id> = gone.map(|(_, request)| request.id()).collect();
        let doomed: Vec<Id> = seen.iter().map(|s| s.id).filter(|id| ids.contains(id)).collect();
        self.lapse(world, &doomed);
        !doomed.is_empty()
    }

    /// Each order of a client does what it does while it waits.
    fn wait_on(&mut self, world: &World, client: usize) {
        let mut order = 0;
        while let Some(now) = self.clients[client].orders.get(order) {
            let orders = self.clients[client].orders.len();
            let at = (client, order);
            if now.open().is_some_and(|request| request.phase == Phase::Unsure) {
                self.resend(world, at);
            } else if now.open().is_some() {
                self.refresh(world, at);
            } else if now.backs_off.is_some() {
                self.retry(world, at);
            } else if !now.is_complete() {
                self.proceed(world, at, false);
            } else {
                self.keep(world, at);
            }
            if self.clients[client].orders.len() == orders {
                order += 1;
            }
        }
    }

    /// A waiter that nothing blocks: whoever unblocked it should have granted it. Others' entries
    /// block it, earlier waiters, and a weaker entry of its own owner, which it would upgrade.
    /// Those that have lapsed without anybody noticing block if `dead_block`.
    pub fn unblocked(&self, dead_block: bool) -> Option<Seen> {
        let seen = &self.seen;
        let place = |id: Id| self.find(id).and_then(|request| request.ticket);
        let blocks = |other: &Seen, me: &Seen| {
            let fresh = self.find(me.id).is_some_and(|r| r.terms.standing == FRESH);
            let before = other.held || (fresh && place(other.id) < place(me.id));
            (other.live || dead_block) && before && other.partition == me.partition
        };
        let waiting = seen.iter().filter(|seen| !seen.held && seen.live);
        let mut free = waiting.filter(|me| {
            let me = self.whole(me);
            !seen.iter().any(|other| {
                let other = self.whole(other);
                let upgrade = other.held && other.id.0 == me.id.0 && me.exceeds(&other);
                blocks(&other, &me) && (other.conflicts(&me) || upgrade)
            })
        });
        free.next().copied()
    }

    /// A request with all keys that it asked for, wherever the service keeps it.
    pub fn whole(&self, seen: &Seen) -> Seen {
        let mut whole = *seen;
        if let Some(request) = self.find(seen.id) {
            request.wishes.iter().for_each(|wish| whole.keys[wish.key] = Some((wish.mode, 0)));
        }
        whole
    }
}

const FRESH: palisade::protocol::Standing = palisade::protocol::Standing::Fresh;
