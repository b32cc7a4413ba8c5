//! What is modelled: processes, keys, faults, and the state of it all between two steps.

use std::collections::BTreeSet;
use std::sync::{Arc, LazyLock, Mutex, OnceLock};
use std::time::{Duration, Instant};

use palisade::protocol::{Acquire, Part, Queue, Rules, Standing};
use palisade::{ClientId, Lease, Mode, OwnerId, Partition, RequestId, ResourceKey, Want};

use crate::drain::Drained;
use crate::service::Seen;
use crate::sloppy::Sloppy;

/// One key, by its number, and how it is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Wish {
    pub key: usize,
    pub mode: Mode,
}

/// A process with a lock client of its own, and the owner for which it asks.
#[derive(Clone, Copy, Debug)]
pub struct Process {
    pub owner: usize,
    /// Whether it made the owner; if not, the owner's id was sent to it.
    pub local: bool,
}

/// What may go wrong, and which freedoms clients take.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// A client may start another order while one is not decided.
    pub concurrent: bool,
    /// A client may give an order up that is not decided.
    pub give_up: bool,
    /// A process may die for good; a new one takes its place when nothing of it is left.
    pub crash: bool,
    /// Leases of live clients may lapse too.
    pub live_lapse: bool,
    /// A lapse is found by the next who looks at the key, not at once.
    pub lazy: bool,
    /// The answer to an acquire may be lost; the client sends it again, or gives up.
    pub lost_replies: bool,
    /// Pushes arrive late or never.
    pub late_pushes: bool,
    /// One acquire at a time may leave a copy in the network that arrives later.
    pub copies: bool,
    /// A release or a cancel reaches the service later than the client's books.
    pub slow_settle: bool,
}

/// No world has more keys.
pub const MOST_KEYS: usize = 4;

/// The model: a small world of processes that lock the keys of one or two partitions.
pub struct World {
    pub name: &'static str,
    pub processes: Vec<Process>,
    /// The partition of each key. Keys are sorted by name within and across partitions.
    pub partitions: Vec<u16>,
    pub names: Vec<ResourceKey>,
    /// The sets that an order may ask for, each sorted by (partition, key).
    pub menu: Vec<Vec<Wish>>,
    /// The most orders of one client, held or under way.
    pub orders: usize,
    pub faults: Faults,
    pub rules: Rules,
    pub sloppy: Option<Sloppy>,
    /// When a run that is bounded by time stops taking steps.
    pub until: Option<Instant>,
    /// Properties that have failed already: the first counterexample, which is a shortest one,
    /// stays.
    pub failed: Mutex<BTreeSet<&'static str>>,
}

impl World {
    /// Three clients and keys in one partition; every set of up to `width` keys in these modes.
    pub fn new(name: &'static str, keys: usize, modes: &[Mode], width: usize) -> Self {
        let names = ["a", "b", "c", "d"].iter().take(keys);
        let names = names.map(|name| ResourceKey::parse(name).unwrap()).collect();
        Self {
            name,
            processes: (0..3).map(|owner| Process { owner, local: true }).collect(),
            partitions: vec![0; keys],
            names,
            menu: menu(keys, modes, width),
            orders: 2,
            faults: Faults { concurrent: true, ..Faults::default() },
            rules: Rules::default(),
            sloppy: None,
            until: None,
            failed: Mutex::default(),
        }
    }

    /// The same with its keys in these partitions.
    pub fn across(mut self, partitions: &[u16]) -> Self {
        self.partitions = partitions.to_vec();
        for set in &mut self.menu {
            set.sort_by_key(|wish| (partitions[wish.key], wish.key));
        }
        self
    }

    pub fn owner(&self, client: usize) -> OwnerId {
        let number = self.processes[client].owner;
        OwnerId::from(uuid::Uuid::from_u128(1 + u128::try_from(number).unwrap()))
    }

    pub fn wants(&self, wishes: &[Wish]) -> Vec<Want> {
        let want = |wish: &Wish| Want::new(self.names[wish.key].clone(), wish.mode);
        wishes.iter().map(want).collect()
    }

    pub fn wishes(&self, wants: &[Want]) -> Vec<Wish> {
        let number = |want: &Want| self.names.iter().position(|name| *name == want.key).unwrap();
        wants.iter().map(|want| Wish { key: number(want), mode: want.mode }).collect()
    }

    /// What becomes of an order's set: one stack of parts, the first partition on top.
    pub fn parts(&self, set: &[Wish]) -> Vec<Todo> {
        let parts = set.chunk_by(|a, b| self.partitions[a.key] == self.partitions[b.key]);
        parts.rev().map(|part| (self.partitions[part[0].key], part.into())).collect()
    }
}

fn menu(keys: usize, modes: &[Mode], width: usize) -> Vec<Vec<Wish>> {
    let mut sets = vec![Vec::new()];
    for key in 0..keys {
        let with = |set: &Vec<Wish>, mode: Mode| [set.as_slice(), &[Wish { key, mode }]].concat();
        let more: Vec<_> =
            sets.iter().flat_map(|set| modes.iter().map(move |mode| with(set, *mode))).collect();
        sets.extend(more);
    }
    sets.retain(|set| (1..=width).contains(&set.len()));
    sets
}

/// Every request has this lease. Its length means nothing: what lapses when is an action.
pub static LEASE: LazyLock<Lease> =
    LazyLock::new(|| Lease::new(Duration::from_millis(120)).unwrap());
/// Every fresh request asks for so many tokens.
pub const BLOCK: u32 = 4;
static CLIENT: LazyLock<ClientId> = LazyLock::new(ClientId::random);

/// The world between two steps. `Hash` and `Eq` see its canonical code only, see `code.rs`.
#[derive(Clone, Debug)]
pub struct State {
    pub now_us: u64,
    pub queues: Vec<Queue>,
    pub clients: Vec<Client>,
    /// How many request ids and how many places in line were given out.
    pub requests: u64,
    pub tickets: u64,
    /// The highest token that was ever given out for each key.
    pub top: Vec<u64>,
    /// The last token for each key that is nobody else's, reserved ones among them.
    pub reserved: Vec<u64>,
    /// The first promise that an answer of the service broke.
    pub broken: Option<Promise>,
    /// What the service shows, and the canonical code: both set at the end of each step.
    pub seen: Arc<[Seen]>,
    pub code: u64,
    /// What draining this state gave, once somebody has asked.
    pub drained: OnceLock<Drained>,
}

/// Promises that are checked on the answer of the very step that may break them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Promise {
    ReEntry,
    Passes,
    Refusal,
    Resend,
    Line,
    Token,
}

#[derive(Clone, Debug, Default)]
pub struct Client {
    pub crashed: bool,
    pub orders: Vec<Order>,
    /// Requests that the client has struck out of its books, and that the service or the network
    /// may still know.
    pub loose: Vec<Request>,
}

/// A part of a set: its partition and its keys.
pub type Todo = (u16, Arc<[Wish]>);

/// A user's wish for a set of keys: decided part by part, and held until it is released.
#[derive(Clone, Debug, Default)]
pub struct Order {
    /// Parts still to be asked for; the last one is next.
    pub todo: Vec<Todo>,
    /// What was granted, and at the end the one that is under way.
    pub requests: Vec<Request>,
    /// The next part was refused and is asked for again, on these terms.
    pub backs_off: Option<Terms>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Terms {
    pub standing: Standing,
    pub queue: bool,
    pub retry: bool,
}

#[derive(Clone, Debug)]
pub struct Request {
    pub ask: Arc<Acquire>,
    pub wishes: Arc<[Wish]>,
    pub terms: Terms,
    pub phase: Phase,
    /// Its place in line at the service, as long as it stands there.
    pub ticket: Option<u64>,
    /// A copy of its acquire is in the network.
    pub copy: bool,
    /// The service has processed a cancel of it.
    pub cancelled: bool,
}

/// What the client knows of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Sent, and not answered.
    Unsure,
    Waiting,
    Held,
    /// A release or a cancel of it is under way.
    Settling {
        cancel: bool,
    },
    /// Nobody cares any more.
    Gone,
}

impl Request {
    pub fn id(&self) -> (OwnerId, RequestId) {
        (self.ask.part.owner, self.ask.part.request)
    }

    pub fn partition(&self) -> usize {
        usize::from(self.ask.part.partition.0)
    }

    pub fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Unsure | Phase::Waiting)
    }
}

impl Order {
    /// Everything is held.
    pub fn is_complete(&self) -> bool {
        self.todo.is_empty()
    }

    /// The request that is under way.
    pub fn open(&self) -> Option<&Request> {
        self.requests.last().filter(|request| request.is_open())
    }
}

impl Client {
    pub fn all(&self) -> impl Iterator<Item = &Request> {
        self.orders.iter().flat_map(|order| &order.requests).chain(&self.loose)
    }

    pub fn all_mut(&mut self) -> impl Iterator<Item = &mut Request> {
        let ordered = self.orders.iter_mut().flat_map(|order| &mut order.requests);
        ordered.chain(&mut self.loose)
    }
}

impl State {
    pub fn new(world: &World) -> Self {
        let partitions = world.partitions.iter().max().map_or(0, |last| usize::from(*last)) + 1;
        Self {
            now_us: 1_000_000,
            queues: vec![Queue::loosened(world.rules); partitions],
            clients: vec![Client::default(); world.processes.len()],
            requests: 0,
            tickets: 0,
            top: vec![0; world.names.len()],
            reserved: vec![0; world.names.len()],
            broken: None,
            seen: Arc::default(),
            code: 0,
            drained: OnceLock::new(),
        }
    }

    pub fn all(&self) -> impl Iterator<Item = (usize, &Request)> {
        let clients = self.clients.iter().enumerate();
        clients.flat_map(|(at, client)| client.all().map(move |request| (at, request)))
    }

    pub fn find(&self, id: (OwnerId, RequestId)) -> Option<&Request> {
        self.all().map(|(_, request)| request).find(|request| request.id() == id)
    }

    /// A new request of `client` for these keys of one partition.
    pub fn request(
        &mut self,
        world: &World,
        client: usize,
        (partition, wishes): &Todo,
        terms: Terms,
    ) -> Request {
        self.requests += 1;
        let part = Part {
            partition: Partition(*partition),
            owner: world.owner(client),
            request: RequestId::from(self.requests),
            wants: world.wants(wishes).into(),
        };
        let ask = Acquire {
            part,
            client: *CLIENT,
            lease: *LEASE,
            standing: terms.standing,
            wait: terms.queue,
            floor: None,
            limit: 16,
            block: if terms.standing == Standing::Fresh { BLOCK } else { 1 },
            metadata: None,
        };
        Request {
            ask: Arc::new(ask),
            wishes: Arc::clone(wishes),
            terms,
            phase: Phase::Unsure,
            ticket: None,
            copy: false,
            cancelled: false,
        }
    }
}
