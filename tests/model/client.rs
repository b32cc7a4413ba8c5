//! What a client does: asks part by part, as `lock/service.rs` does, and hears, refreshes, gives
//! up.

use palisade::protocol::{Acquired, Admission, Renewed, Standing};
use palisade::{Partition, Want};

use crate::service::Id;
use crate::sloppy::{Books, admission};
use crate::world::{Client, Order, Phase, State, Terms, Wish, World};

/// Where an order is: its client, and its place among the client's orders.
pub type At = (usize, usize);

impl State {
    fn order(&mut self, (client, order): At) -> &mut Order {
        &mut self.clients[client].orders[order]
    }

    /// Starts an order for `set` and asks for its first part.
    pub fn begin(&mut self, world: &World, client: usize, set: &[Wish], lost: bool) {
        let orders = &mut self.clients[client].orders;
        orders.push(Order { todo: world.parts(set), ..Order::default() });
        let at = (client, orders.len() - 1);
        self.proceed(world, at, lost);
    }

    /// Asks the books, then the service, for the next part of an order.
    pub fn proceed(&mut self, world: &World, at: At, lost: bool) {
        loop {
            let Some((partition, wishes)) = self.order(at).todo.last().cloned() else { return };
            match self.admission(world, at, partition, &wishes) {
                Admission::Ask { standing, queue, retry } => {
                    return self.send(world, at, Terms { standing, queue, retry }, lost);
                }
                Admission::Split { held, new } => {
                    let (held, new) = (world.wishes(&held), world.wishes(&new));
                    self.order(at).todo.pop();
                    let parts = [(partition, new.into()), (partition, held.into())];
                    self.order(at).todo.extend(parts);
                }
                _ => return self.fail(world, at),
            }
        }
    }

    fn admission(
        &self,
        world: &World,
        (client, order): At,
        partition: u16,
        wishes: &[Wish],
    ) -> Admission {
        let books = self.clients[client].books(world);
        let others = self.clients[client].orders.iter().enumerate().filter(|(at, _)| *at != order);
        let asking = others.filter(|(_, order)| order.asks_for_new(&books, world));
        let outstanding: Vec<_> =
            asking.filter_map(|(_, order)| Some(Partition(order.todo.last()?.0))).collect();
        let local = world.processes[client].local;
        let books = Books { held: &books, outstanding: &outstanding, local };
        admission(world.sloppy, Partition(partition), &world.wants(wishes), &books)
    }

    /// Sends a request for the next part. With its answer lost, the client knows nothing.
    pub fn send(&mut self, world: &World, at: At, terms: Terms, lost: bool) {
        let Some(part) = self.order(at).todo.last().cloned() else { return };
        let request = self.request(world, at.0, &part, terms);
        let answer = self.acquire(world, &request);
        self.order(at).backs_off = None;
        self.order(at).requests.push(request);
        if !lost {
            self.answer(world, at, &answer);
        }
    }

    /// Sends the same request again.
    pub fn resend(&mut self, world: &World, at: At) {
        let Some(request) = self.order(at).open().cloned() else { return };
        let answer = self.acquire(world, &request);
        self.answer(world, at, &answer);
    }

    fn answer(&mut self, world: &World, at: At, answer: &Acquired) {
        let local = world.processes[at.0].local;
        let client = &self.clients[at.0];
        let new = client.orders[at.1].asks_for_new(&client.books(world), world);
        let Some(request) = self.order(at).requests.last_mut() else { return };
        match answer {
            Acquired::Granted(_) => self.granted(at),
            Acquired::Queued { .. } => request.phase = Phase::Waiting,
            Acquired::Busy { waiters, .. } => {
                let terms = request.terms;
                let handed_over = terms.standing == Standing::Incremental && *waiters;
                self.strike_last(at);
                if local && new && terms.retry && !handed_over {
                    self.order(at).backs_off = Some(terms);
                } else {
                    self.fail(world, at);
                }
            }
            _ => {
                self.strike_last(at);
                self.fail(world, at);
            }
        }
    }

    /// Takes a refused request out. The network may still know it.
    fn strike_last(&mut self, (client, order): At) {
        let client = &mut self.clients[client];
        if let Some(mut request) = client.orders[order].requests.pop() {
            request.phase = Phase::Gone;
            client.loose.push(request);
        }
    }

    pub fn granted(&mut self, at: At) {
        let order = self.order(at);
        order.todo.pop();
        if let Some(request) = order.requests.last_mut() {
            request.phase = Phase::Held;
        }
    }

    /// Asks for the refused part again. The terms are those of the first attempt.
    pub fn retry(&mut self, world: &World, at: At) {
        if let Some(terms) = self.order(at).backs_off {
            self.send(world, at, terms, false);
        }
    }

    /// Refreshes a request that waits. One that the service has forgotten is asked for anew.
    pub fn refresh(&mut self, world: &World, at: At) {
        let Some(request) = self.order(at).open().cloned() else { return };
        match self.renew(&request.ask.part, true) {
            Renewed::Held(Some(_)) => self.granted(at),
            Renewed::Held(None) => panic!("a waiter is told its tokens"),
            Renewed::Queued { .. } => {}
            _ => {
                self.strike_last(at);
                self.send(world, at, request.terms, false);
            }
        }
    }

    /// The watchdog renews what an order holds. When something is lost, the user gives up the rest.
    pub fn keep(&mut self, world: &World, at: At) {
        let held = self.order(at).requests.clone();
        let held = held.into_iter().filter(|request| request.phase == Phase::Held);
        let mut lost = false;
        for request in held {
            lost |= self.renew(&request.ask.part, false) == Renewed::Lost;
        }
        if lost {
            self.fail(world, at);
        }
    }

    /// Ends an order, whatever became of it: what is held is released, what is under way cancelled.
    pub fn fail(&mut self, world: &World, (client, order): At) {
        let client_at = client;
        let client = &mut self.clients[client];
        for mut request in client.orders.remove(order).requests {
            request.phase = Phase::Settling { cancel: request.is_open() };
            client.loose.push(request);
        }
        if !world.faults.slow_settle {
            self.settle(client_at);
        }
    }

    /// All releases and cancels of a client arrive.
    pub fn settle(&mut self, client: usize) {
        for at in 0..self.clients[client].loose.len() {
            self.deliver(client, at);
        }
    }

    /// One release or cancel arrives.
    pub fn deliver(&mut self, client: usize, at: usize) {
        let request = &mut self.clients[client].loose[at];
        let Phase::Settling { cancel } = request.phase else { return };
        request.phase = Phase::Gone;
        request.cancelled |= cancel;
        let part = request.ask.part.clone();
        if cancel {
            self.cancel(&part);
        } else {
            self.release(&part);
        }
    }

    /// The process is gone, and with it everything that it had not sent.
    pub fn crash(&mut self, client: usize) {
        let client = &mut self.clients[client];
        client.crashed = true;
        for order in client.orders.drain(..) {
            client.loose.extend(order.requests);
        }
        for request in &mut client.loose {
            request.phase = Phase::Gone;
        }
    }

    /// A late copy of an acquire arrives. Nobody listens to its answer.
    pub fn copy_arrives(&mut self, world: &World, id: Id) {
        let Some(request) = self.find(id).cloned() else { return };
        let known = self.look(world).iter().any(|seen| seen.id == id);
        let answer = self.acquire(world, &request);
        if request.cancelled && !known && answer != Acquired::Cancelled {
            self.breaks(crate::world::Promise::Resend);
        }
        for request in self.clients.iter_mut().flat_map(Client::all_mut) {
            request.copy &= request.id() != id;
        }
    }

    /// Pushes are heard at once: whoever was granted knows.
    pub fn hear_all(&mut self) {
        let held: Vec<Id> = self.seen.iter().filter(|seen| seen.held).map(|seen| seen.id).collect();
        for client in 0..self.clients.len() {
            for order in 0..self.clients[client].orders.len() {
                let open = self.clients[client].orders[order].open();
                if open.is_some_and(|r| r.phase == Phase::Waiting && held.contains(&r.id())) {
                    self.granted((client, order));
                }
            }
        }
    }

    /// Forgets requests of which nothing is left, and clients that died without leaving anything.
    pub fn tidy(&mut self) {
        let seen = &self.seen;
        for client in &mut self.clients {
            client.loose.retain(|r| r.copy || seen.iter().any(|seen| seen.id == r.id()));
            client.crashed &= !client.loose.is_empty();
        }
    }
}

impl Client {
    /// What the client believes to hold: each key once in its strongest mode, sorted.
    pub fn books(&self, world: &World) -> Vec<(Partition, Want)> {
        let requests = self.orders.iter().flat_map(|order| &order.requests);
        let held = requests.filter(|request| request.phase == Phase::Held);
        let mut wishes: Vec<Wish> =
            held.flat_map(|request| request.wishes.iter()).copied().collect();
        wishes.sort_by_key(|wish| {
            (world.partitions[wish.key], wish.key, std::cmp::Reverse(wish.mode))
        });
        wishes.dedup_by_key(|wish| wish.key);
        let at = |wish: &Wish| Partition(world.partitions[wish.key]);
        wishes.iter().map(at).zip(world.wants(&wishes)).collect()
    }
}

impl Order {
    /// Whether a request for a key that the owner does not hold is under way or backs off.
    fn asks_for_new(&self, books: &[(Partition, Want)], world: &World) -> bool {
        let under_way = self.open().is_some() || self.backs_off.is_some();
        let wishes = self.todo.last().map(|(_, wishes)| &**wishes).unwrap_or_default();
        let new = |wish: &Wish| !books.iter().any(|(_, want)| want.key == world.names[wish.key]);
        under_way && wishes.iter().any(new)
    }
}
