//! Every operation through every fault, at every point of the exchange: afterwards the state at the
//! server is what the caller was told.
//!
//! A *cell* is one operation, one fault, and what becomes of the network then. It has a backend of
//! its own whose connection runs through a proxy of its own, and another one beside it that sees
//! the truth. Cells run side by side in lanes, each with a database of one server; most of their
//! time is waiting.

mod locks;
mod seam;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use palisade::backend::{RedisBackend, RedisOptions};
use tokio::task::{JoinError, LocalSet, spawn_local};

use crate::redis_asks::SOON;
use crate::support::{Fault, Harm, Point, Proxy, RedisServer, Side, wait_until};

/// How long a caller waits for one call.
const CALL: Duration = Duration::from_millis(500);
/// How long the driver bears with a server that is out of reach: less, so that callers hear of it.
const PATIENCE: Duration = Duration::from_millis(250);
/// How many cells run at once.
const LANES: usize = 32;

/// What the network does to one call.
#[derive(Clone, Copy, Debug)]
struct Trouble {
    fault: Fault,
    /// No new connection is made until the caller has been told; then the network heals. Else the
    /// way around the fault is open at once, and the fault itself is never repaired.
    stays_away: bool,
}

fn troubles() -> Vec<Trouble> {
    let ms = Duration::from_millis;
    let harms = [
        Harm::Delay(ms(20)),
        // Beyond the patience of the caller: it arrives after its own successor.
        Harm::Delay(2 * CALL),
        Harm::Drop,
        Harm::Cut,
        Harm::Reset,
        Harm::HalfOpen(Side::Client),
        Harm::HalfOpen(Side::Server),
        // A request takes longer than its caller waits, most replies do not.
        Harm::Trickle(ms(3)),
    ];
    let mut faults = Vec::new();
    for at in Point::ALL {
        faults.extend(harms.map(|harm| Fault::At(at, harm)));
    }
    for at in [Point::Reply, Point::HalfReply, Point::After] {
        faults.push(Fault::At(at, Harm::Garbage(at as u64)));
    }
    let of = |fault: Fault| {
        // Who has its reply is past caring how soon the network heals.
        let ways: &[bool] = if fault.point() == Point::After { &[false] } else { &[false, true] };
        ways.iter().map(move |stays_away| Trouble { fault, stays_away: *stays_away })
    };
    faults.into_iter().flat_map(of).collect()
}

impl Trouble {
    /// Whether the caller may be left without an answer: it has none yet, and either nothing tells
    /// it to ask again, or there is no way to do so.
    fn leaves_doubt(self) -> bool {
        let Fault::At(at, harm) = self.fault else { return true };
        let silent = match harm {
            Harm::Delay(pause) => pause > CALL,
            Harm::Drop | Harm::HalfOpen(Side::Server) | Harm::Trickle(_) => true,
            _ => self.stays_away,
        };
        silent && at != Point::After
    }
}

/// One database of the server that all lanes share, where one cell runs at a time.
#[derive(Clone)]
struct Lane {
    server: Arc<RedisServer>,
    number: usize,
    /// Past the proxy.
    direct: Arc<RedisBackend>,
}

impl Lane {
    async fn open(server: Arc<RedisServer>, number: usize) -> Self {
        let url = format!("redis://127.0.0.1:{}/{number}", server.port());
        let direct = RedisBackend::connect(&url, RedisOptions::default()).await.unwrap();
        Self { server, number, direct: Arc::new(direct) }
    }

    /// A backend behind a proxy.
    async fn through(&self, proxy: &Proxy) -> RedisBackend {
        let url = format!("redis://127.0.0.1:{}/{}", proxy.port(), self.number);
        let options = RedisOptions { reconnect_for: PATIENCE, ..RedisOptions::default() };
        let started = Instant::now();
        loop {
            // On a busy machine it takes longer than the patience that is tested.
            match RedisBackend::connect(&url, options.clone()).await {
                Ok(backend) => return backend,
                Err(error) => assert!(started.elapsed() < SOON, "{error}"),
            }
        }
    }

    /// The names of all keys that are not there for ever, each with its time to live in ms.
    fn keys(&self) -> Vec<(String, i64)> {
        let script = "redis.call('SELECT', ARGV[1]) \
             local found = {} \
             for _, name in ipairs(redis.call('KEYS', '*')) do \
               found[#found + 1] = redis.call('PTTL', name) .. ' ' .. name \
             end \
             return found";
        let found = self.server.command(&["EVAL", script, "0", &self.number.to_string()]);
        let pair = |line: &str| {
            let (ttl, name) = line.split_once(' ').unwrap();
            (name.to_owned(), ttl.parse().unwrap())
        };
        let keys = found.lines().filter(|line| !line.is_empty()).map(pair);
        let stays = |name: &str| ["palisade:{0}:t", "palisade:partitions"].contains(&name);
        keys.filter(|(name, _)| !stays(name)).collect()
    }

    /// Nothing is left but tombstones, which end by themselves.
    fn assert_clean(&self) {
        for (name, ttl) in self.keys() {
            let is_tombstone = name.starts_with("palisade:{0}:x:");
            assert!(is_tombstone && (0..=30_000).contains(&ttl), "left: {name}, for {ttl} ms");
        }
    }
}

/// Heals the network and waits until nothing that was sent is still on its way. The clients must
/// have closed their connections.
async fn dust_settles(proxy: &Proxy) {
    proxy.refuse(true);
    proxy.calm();
    wait_until("the last connection has ended", SOON, async || proxy.connections() == 0).await;
}

/// Runs all cells, and says how often they ended how.
///
/// # Panics
/// When a cell fails; all that failed are named.
async fn run<C, F>(cells: Vec<C>, cell: impl Fn(C, Lane) -> F) -> BTreeMap<&'static str, usize>
where
    C: Copy + Debug,
    F: Future<Output = &'static str> + 'static,
{
    let started = Instant::now();
    let server = Arc::new(RedisServer::start_with(&["--databases", &LANES.to_string()]));
    let (count, cells) = (cells.len(), RefCell::new(cells));
    let (ended, failed) = (RefCell::new(BTreeMap::new()), RefCell::new(Vec::new()));
    let lanes = (0..LANES).map(async |number| {
        let lane = Lane::open(Arc::clone(&server), number).await;
        loop {
            let Some(next) = cells.borrow_mut().pop() else { return };
            match spawn_local(cell(next, lane.clone())).await {
                Ok(end) => *ended.borrow_mut().entry(end).or_default() += 1,
                Err(panic) => failed.borrow_mut().push(format!("{next:?}: {}", reason(panic))),
            }
        }
    });
    LocalSet::new().run_until(join_all(lanes)).await;
    let (ended, failed) = (ended.into_inner(), failed.into_inner());
    println!("{count} cells in {:.1?}: {ended:?}", started.elapsed());
    assert!(failed.is_empty(), "{} cells failed:\n{}", failed.len(), failed.join("\n"));
    ended
}

fn reason(ended: JoinError) -> String {
    let panic = ended.into_panic();
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
}
