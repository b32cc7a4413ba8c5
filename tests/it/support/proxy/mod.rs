//! A proxy between clients and one server that does to their connections what networks do.
//!
//! A fault strikes one exchange, a request and its reply, at one [`Point`] of it. It is *planned*
//! ([`Proxy::plan`]: the next request that contains a text), or drawn from a seed for as long as a
//! run lasts ([`Proxy::torment`] until [`Proxy::calm`]).
//!
//! # What counts as a request and a reply
//! What one read from the client, or the next read from the server, brings. That is exact where a
//! connection carries one call at a time. Where calls share a connection, a fault that was meant
//! for the reply of one may strike that of another, or a push.

mod connection;
mod schedule;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

pub use schedule::Rates;
use schedule::Schedule;

/// What happens to one exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The server gets the request; the client sees a closed connection in place of the reply. The
    /// server keeps its side open, as if the network between them had broken.
    LoseReply,
    /// The same, before the server has seen the request.
    LoseRequest,
    /// Any harm at any point.
    At(Point, Harm),
}

/// Where in an exchange a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Point {
    /// Nothing of the request has been forwarded.
    Request,
    /// Half of the request has been forwarded.
    HalfRequest,
    /// The server has answered, and nothing of the reply has been forwarded.
    Reply,
    /// Half of the reply has been forwarded.
    HalfReply,
    /// The client has its reply.
    After,
}

impl Point {
    pub const ALL: [Self; 5] =
        [Self::Request, Self::HalfRequest, Self::Reply, Self::HalfReply, Self::After];

    fn is_before_the_server(self) -> bool {
        matches!(self, Self::Request | Self::HalfRequest)
    }

    /// How much of a message of `bytes` passes before the fault strikes.
    fn passed(self, bytes: usize) -> usize {
        match self {
            Self::Request | Self::Reply => 0,
            Self::HalfRequest | Self::HalfReply => bytes / 2,
            Self::After => bytes,
        }
    }
}

/// What a connection suffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// Nothing passes for this long; then everything does, late.
    Delay(Duration),
    /// From here on everything is swallowed, in both directions. Both sides stay open.
    Drop,
    /// Both sides are closed.
    Cut,
    /// Both sides are reset.
    Reset,
    /// This side is closed. The other one hears nothing of it, and what it sends is swallowed.
    HalfOpen(Side),
    /// What is left of the message, or else the next one, passes a byte at a time, with such a
    /// pause after each.
    Trickle(Duration),
    /// What is left of the reply is replaced by noise from this seed. It never strikes a request: a
    /// request that was altered may be a valid other one, against which no lock can help.
    Garbage(u64),
}

/// An end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Client,
    Server,
}

/// A fault on its way to its exchange.
#[derive(Clone, Copy, Debug)]
struct Strike {
    at: Point,
    harm: Harm,
    /// It ends when the network is calmed after this.
    epoch: u64,
}

impl Fault {
    fn place(self) -> (Point, Harm) {
        match self {
            Self::LoseReply => (Point::Reply, Harm::HalfOpen(Side::Client)),
            Self::LoseRequest => (Point::Request, Harm::HalfOpen(Side::Client)),
            Self::At(at, Harm::Garbage(seed)) => (at.max(Point::Reply), Harm::Garbage(seed)),
            Self::At(at, harm) => (at, harm),
        }
    }

    pub fn point(self) -> Point {
        self.place().0
    }

    /// What it is counted as.
    pub fn name(self) -> &'static str {
        match self.place() {
            (Point::Reply, Harm::HalfOpen(Side::Client)) => "lose reply",
            (_, Harm::Delay(_)) => "delay",
            (_, Harm::Drop) => "drop",
            (_, Harm::Cut) => "cut",
            (_, Harm::Reset) => "reset",
            (_, Harm::HalfOpen(_)) => "half-open",
            (_, Harm::Trickle(_)) => "trickle",
            (_, Harm::Garbage(_)) => "garbage",
        }
    }
}

/// A proxy on a loopback port of its own, for one server. Dropped, it closes all connections.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    accepting: tokio::task::JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    plans: Mutex<Vec<Plan>>,
    schedule: Mutex<Option<Schedule>>,
    /// Counts how often the network was calmed.
    epoch: watch::Sender<u64>,
    struck: Mutex<BTreeMap<&'static str, usize>>,
    done: Notify,
    requests: AtomicUsize,
    connections: AtomicUsize,
    refuses: AtomicBool,
    severed: watch::Sender<bool>,
}

/// A fault that waits for its request.
#[derive(Debug)]
struct Plan {
    text: Vec<u8>,
    /// How many such requests pass before.
    spared: usize,
    fault: Fault,
}

impl Proxy {
    /// A proxy for the server at `port` on 127.0.0.1.
    pub async fn start(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let own = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared::default());
        let accepting = tokio::spawn(accept(listener, port, Arc::clone(&shared)));
        Self { port: own, shared, accepting }
    }

    /// Where clients connect to on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The next request that contains `text` meets `fault`. Only that one.
    pub fn plan(&self, text: &str, fault: Fault) {
        self.plan_nth(0, text, fault);
    }

    /// The request that contains `text` after `spared` others that do meets `fault`.
    pub fn plan_nth(&self, spared: usize, text: &str, fault: Fault) {
        let plan = Plan { text: text.as_bytes().to_vec(), spared, fault };
        self.shared.plans.lock().unwrap().push(plan);
    }

    /// Resolves when a fault has struck since this was last asked.
    pub async fn happened(&self) {
        self.shared.done.notified().await;
    }

    /// From now on faults strike at these rates. Which of the requests that follow meet which fault
    /// depends on the seed alone.
    pub fn torment(&self, seed: u64, rates: Rates) {
        *self.shared.schedule.lock().unwrap() = Some(Schedule::new(seed, rates));
    }

    /// The network heals: nothing is planned any more, what is held back passes, and what was
    /// swallowed or left half open is closed.
    pub fn calm(&self) {
        *self.shared.schedule.lock().unwrap() = None;
        self.shared.plans.lock().unwrap().clear();
        self.shared.epoch.send_modify(|epoch| *epoch += 1);
    }

    /// Whether new connections are closed at once.
    pub fn refuse(&self, refuse: bool) {
        self.shared.refuses.store(refuse, Ordering::SeqCst);
    }

    /// Whether nobody gets through: connections that exist are closed, and so are new ones.
    pub fn sever(&self, severed: bool) {
        self.shared.severed.send_replace(severed);
    }

    /// How often each fault has struck, by [`Fault::name`].
    pub fn struck(&self) -> BTreeMap<&'static str, usize> {
        self.shared.struck.lock().unwrap().clone()
    }

    /// How many connections have not ended. When there are none, what was sent through them has
    /// been read by the server or never will be.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// How often a client has sent something after it had an answer: round trips, from all of them.
    pub fn round_trips(&self) -> usize {
        self.shared.requests.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, port: u16, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        if shared.refuses.load(Ordering::SeqCst) || *shared.severed.borrow() {
            continue;
        }
        if let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await {
            client.set_nodelay(true).unwrap();
            server.set_nodelay(true).unwrap();
            shared.connections.fetch_add(1, Ordering::SeqCst);
            connections.spawn(connection::carry(client, server, Arc::clone(&shared)));
        }
    }
}

impl Shared {
    /// What befalls a request: what was planned for it, or else what is drawn for it.
    fn strike(&self, request: &[u8]) -> Option<Strike> {
        let epoch = *self.epoch.borrow();
        let drawn = self.schedule.lock().unwrap().as_mut().and_then(Schedule::draw);
        let (at, harm) = self.planned(request).or(drawn)?.place();
        Some(Strike { at, harm, epoch })
    }

    fn planned(&self, request: &[u8]) -> Option<Fault> {
        let mut plans = self.plans.lock().unwrap();
        let mut due = None;
        for (index, plan) in plans.iter_mut().enumerate() {
            let text = plan.text.as_slice();
            if !text.is_empty() && !request.windows(text.len()).any(|window| window == text) {
                continue;
            }
            match plan.spared.checked_sub(1) {
                Some(spared) => plan.spared = spared,
                None => due = due.or(Some(index)),
            }
        }
        due.map(|index| plans.remove(index).fault)
    }

    fn count(&self, strike: Strike) {
        let name = Fault::At(strike.at, strike.harm).name();
        *self.struck.lock().unwrap().entry(name).or_default() += 1;
        self.done.notify_one();
    }

    /// Resolves when the network was calmed after `epoch`.
    async fn calmed(&self, epoch: u64) {
        let _ = self.epoch.subscribe().wait_for(|now| *now != epoch).await;
    }
}
