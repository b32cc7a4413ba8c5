//! The canonical form of a state: what two states share when the same can happen from them.
//!
//! Clients are alike, so the code is a sorted list of client codes. Request ids and token values
//! mean nothing; places in line count by rank. Deadlines are erased, since any lease may lapse at
//! any time: it only counts whether one has. Who stands in which line follows from the requests and
//! their places, as long as the property `everyone stands in line on each key` holds.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use palisade::Mode;
use palisade::protocol::Standing;

use crate::service::Seen;
use crate::world::{Client, Order, Phase, Request, State, Terms, Wish, World};

impl State {
    /// Codes the state, and keeps the code for `Hash` and `Eq`.
    pub fn encode(&mut self, world: &World) {
        let mut tickets: Vec<_> =
            self.all().filter_map(|(_, r)| Some((r.partition(), r.ticket?))).collect();
        tickets.sort_unstable();
        let view = View { world, seen: &self.seen, tickets: &tickets, top: &self.top };
        let coded = |(at, client): (usize, &Client)| {
            let mut code = Vec::with_capacity(64);
            view.client(at, client, &mut code);
            code
        };
        let mut clients: Vec<Vec<u8>> = self.clients.iter().enumerate().map(coded).collect();
        clients.sort_unstable();
        let mut hasher = DefaultHasher::new();
        self.broken.hash(&mut hasher);
        clients.hash(&mut hasher);
        self.code = hasher.finish();
    }
}

impl Hash for State {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.code.hash(state);
    }
}

impl PartialEq for State {
    fn eq(&self, other: &State) -> bool {
        self.code == other.code
    }
}

impl Eq for State {}

struct View<'a> {
    world: &'a World,
    seen: &'a [Seen],
    /// The places in line that are taken: partition and ticket, sorted.
    tickets: &'a [(usize, u64)],
    top: &'a [u64],
}

impl View<'_> {
    fn client(&self, at: usize, client: &Client, code: &mut Vec<u8>) {
        let process = self.world.processes[at];
        let shared = self.world.processes.iter().filter(|p| p.owner == process.owner).count() > 1;
        let name = if shared { 1 + at } else { 0 };
        code.extend([byte(name), u8::from(client.crashed)]);
        let mut orders: Vec<Vec<u8>> = client.orders.iter().map(|o| self.order(o)).collect();
        orders.sort_unstable();
        let mut loose: Vec<Vec<u8>> = client.loose.iter().map(|r| self.request(r)).collect();
        loose.sort_unstable();
        code.extend([byte(orders.len()), byte(loose.len())]);
        code.extend(orders.into_iter().chain(loose).flatten());
    }

    fn order(&self, order: &Order) -> Vec<u8> {
        let mut code = vec![byte(order.todo.len())];
        for (_, part) in &order.todo {
            wishes(part, &mut code);
        }
        code.push(order.backs_off.map_or(0, terms));
        // All but the one under way are held, and their order means nothing.
        let mut requests: Vec<_> = order.requests.iter().map(|r| self.request(r)).collect();
        requests.sort_unstable();
        code.push(byte(requests.len()));
        code.extend(requests.into_iter().flatten());
        code
    }

    fn request(&self, request: &Request) -> Vec<u8> {
        let mut code = Vec::with_capacity(16);
        let phase = match request.phase {
            Phase::Unsure => 0,
            Phase::Waiting => 1,
            Phase::Held => 2,
            Phase::Settling { cancel } => 3 + u8::from(cancel),
            Phase::Gone => 5,
        };
        let seen = self.seen.iter().find(|seen| seen.id == request.id());
        let there = match seen {
            None => 0,
            Some(seen) => 1 + u8::from(seen.held) + 2 * u8::from(seen.live),
        };
        // Terms count while the request can still be sent or granted.
        let undecided = request.is_open() || request.copy || seen.is_some_and(|seen| !seen.held);
        code.extend([phase, there, if undecided { terms(request.terms) } else { 0 }]);
        code.extend([u8::from(request.copy), u8::from(request.cancelled)]);
        let place = request.ticket.map(|ticket| (request.partition(), ticket));
        let rank = place.and_then(|place| self.tickets.binary_search(&place).ok());
        code.push(rank.map_or(0, |rank| byte(rank + 1)));
        // What has lapsed and was not found is only dangerous with a token that others have passed.
        let stale = seen.is_some_and(|seen| {
            let newest = |(key, _, token)| token == self.top[key];
            seen.held && !seen.live && !seen.keys().all(newest)
        });
        code.push(u8::from(stale));
        wishes(&request.wishes, &mut code);
        code
    }
}

fn wishes(set: &[Wish], code: &mut Vec<u8>) {
    code.push(byte(set.len()));
    code.extend(set.iter().map(|wish| byte(wish.key) * 2 + u8::from(wish.mode == Mode::Exclusive)));
}

fn terms(terms: Terms) -> u8 {
    let fresh = terms.standing == Standing::Fresh;
    1 + u8::from(fresh) + 2 * u8::from(terms.queue) + 4 * u8::from(terms.retry)
}

fn byte(number: usize) -> u8 {
    u8::try_from(number).expect("a small world")
}
