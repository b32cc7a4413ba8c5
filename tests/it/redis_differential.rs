//! Random operations against the memory backend, which is the reference, and against Redis: the
//! same verdicts, the same hand-overs, the same state to be seen.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use palisade::backend::{LockBackend, MemoryBackend, RedisBackend};
use palisade::protocol::{
    Acquire, Acquired, Followed, Grant, HandOver, Inspection, Part, Renewed, Standing,
};
use palisade::{ClientId, FencingToken, Mode, OwnerId, RequestId, ResourceKey, Want};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::redis_asks::{Client, P0, SOON, connect, key, lease, left, renewal};
use crate::support::{RedisServer, wait_until};

const KEYS: [&str; 4] = ["a", "b{}", "c d", "ё;,*"];
const OWNERS: usize = 4;
const LONG: u64 = 60_000;
const SHORT: u64 = 400;

/// One step; numbers are taken modulo what there is.
#[derive(Clone, Debug)]
enum Step {
    Acquire {
        owner: usize,
        /// For each key: not wanted (0 to 3), shared (4, 5) or exclusive (6, 7).
        wants: [u8; KEYS.len()],
        wait: bool,
        incremental: bool,
        limit: u32,
        short: bool,
        block: u32,
        metadata: Option<String>,
    },
    /// An acquire is sent again, whatever has become of it.
    Again(usize),
    Release(usize),
    Cancel(usize),
    Renew(Vec<(usize, bool)>),
    /// Waits until all short leases have lapsed, then lets all who wait refresh.
    Lapse,
}

fn step(lapses: bool) -> BoxedStrategy<Step> {
    let metadata = prop_oneof![4 => Just(None), 1 => "[a-c;:\n]{0,4}".prop_map(Some)];
    let acquire = (
        0..OWNERS,
        any::<[u8; KEYS.len()]>(),
        prop::bool::weighted(0.7),
        prop::bool::weighted(0.2),
        1..5_u32,
        prop::bool::weighted(if lapses { 0.5 } else { 0.0 }),
        // An hour of tokens is more than the counter may be ahead of the clock.
        prop_oneof![4 => Just(1), 4 => 2..200_u32, 1 => Just(3_600_000_000)],
        metadata,
    )
        .prop_map(|(owner, wants, wait, incremental, limit, short, block, metadata)| {
            Step::Acquire {
                owner,
                wants: wants.map(|want| want % 8),
                wait,
                incremental,
                limit,
                short,
                block,
                metadata,
            }
        });
    let index = 0..1000_usize;
    prop_oneof![
        10 => acquire,
        2 => index.clone().prop_map(Step::Again),
        6 => index.clone().prop_map(Step::Release),
        2 => index.clone().prop_map(Step::Cancel),
        3 => vec((index, any::<bool>()), 1..5).prop_map(Step::Renew),
        if lapses { 2 } else { 0 } => Just(Step::Lapse),
    ]
    .boxed()
}

/// An answer with what the two may differ in taken out: times, and the tokens' numbers.
#[derive(Debug, PartialEq)]
enum Answer {
    Granted(RequestId),
    Queued(u32),
    Busy(ResourceKey, BTreeSet<OwnerId>, bool),
    Other(String),
}

/// One service, with the client that listens to it.
struct Side<'a> {
    backend: &'a dyn LockBackend,
    client: Client,
    heard: usize,
    heard_followed: usize,
    /// The tokens in the answers of this step, with their keys and how many were reserved.
    tokens: Vec<(ResourceKey, FencingToken, u32)>,
}

impl<'a> Side<'a> {
    async fn new(backend: &'a dyn LockBackend, id: ClientId) -> Self {
        let client = Client::with_id(backend, id).await;
        Self { backend, client, heard: 0, heard_followed: 0, tokens: Vec::new() }
    }

    fn note(&mut self, part: &Part, grant: &Grant) {
        for (want, token) in part.wants.iter().zip(&grant.tokens) {
            self.tokens.push((want.key.clone(), *token, grant.block));
        }
    }

    async fn acquire(&mut self, ask: &Acquire) -> Answer {
        match self.backend.acquire(ask).await.unwrap() {
            Acquired::Granted(grant) => {
                self.note(&ask.part, &grant);
                Answer::Granted(grant.request)
            }
            Acquired::Queued { position, ask_again_in } => {
                assert!(ask_again_in <= ask.lease.refresh(), "{ask_again_in:?}");
                Answer::Queued(position)
            }
            Acquired::Busy { key, holders, waiters } => {
                Answer::Busy(key, holders.into_iter().collect(), waiters)
            }
            other => Answer::Other(format!("{other:?}")),
        }
    }

    async fn renew(&mut self, asks: &[(Acquire, bool)]) -> Vec<String> {
        let renewals: Vec<_> = asks.iter().map(|(ask, waiting)| renewal(ask, *waiting)).collect();
        let answers = self.backend.renew(P0, &renewals).await.unwrap();
        let mut told = Vec::new();
        for (answer, (ask, _)) in answers.iter().zip(asks) {
            if let Renewed::Held(Some(grant)) = answer {
                self.note(&ask.part, grant);
            }
            told.push(match answer {
                Renewed::Held(Some(_)) => "held, with tokens".to_owned(),
                Renewed::Queued { .. } => "queued".to_owned(),
                other => format!("{other:?}"),
            });
        }
        told
    }

    async fn inspect(&mut self) -> Vec<String> {
        let mut seen = Vec::new();
        for name in KEYS {
            let Inspection { holders, waiters } =
                self.backend.inspect(P0, &key(name)).await.unwrap();
            for holder in holders {
                self.tokens.push((key(name), holder.token, 1));
                seen.push(format!(
                    "{name} held by {} {} {} {:?}",
                    holder.owner, holder.request, holder.mode, holder.metadata
                ));
            }
            for waiter in waiters {
                seen.push(format!(
                    "{name} waited for by {} {} {} {:?}",
                    waiter.owner, waiter.request, waiter.mode, waiter.metadata
                ));
            }
        }
        seen
    }

    /// The grants that were pushed since the last call. A ping on the same connection comes after
    /// them.
    async fn handed_over(&mut self) -> Vec<HandOver> {
        self.backend.ping().await.unwrap();
        let all = self.client.pushed();
        let new = all[self.heard..].to_vec();
        self.heard = all.len();
        new
    }

    /// Who was told that it is followed since the last call, each once.
    fn followed(&mut self) -> BTreeSet<Followed> {
        let all = self.client.followed();
        let new = all[self.heard_followed..].iter().copied().collect();
        self.heard_followed = all.len();
        new
    }
}

/// Two services that must not be told apart.
struct Pair<'a> {
    memory: Side<'a>,
    redis: Side<'a>,
    asks: Vec<Acquire>,
    owners: Vec<OwnerId>,
    pairs: BTreeMap<(Option<ResourceKey>, FencingToken), FencingToken>,
    /// Whether leases lapse: then only what holds for each key is compared, and only at rest.
    lapses: bool,
    first_short: Option<Instant>,
    /// How many blocks of tokens were the same.
    blocks: usize,
}

impl<'a> Pair<'a> {
    async fn new(memory: &'a MemoryBackend, redis: &'a RedisBackend, lapses: bool) -> Self {
        let id = ClientId::random();
        Self {
            memory: Side::new(memory, id).await,
            redis: Side::new(redis, id).await,
            asks: Vec::new(),
            owners: (0..OWNERS).map(|_| OwnerId::new(id)).collect(),
            pairs: BTreeMap::new(),
            lapses,
            first_short: None,
            blocks: 0,
        }
    }

    fn pick(&self, index: usize) -> Option<Acquire> {
        (!self.asks.is_empty()).then(|| self.asks[index % self.asks.len()].clone())
    }

    /// Takes a step on both sides, twice, and compares.
    async fn take(&mut self, step: &Step) {
        match step {
            Step::Acquire { .. } => {
                let Some(ask) = self.make(step).await else { return };
                self.asks.push(ask.clone());
                self.acquire(&ask).await;
            }
            Step::Again(index) => {
                let Some(ask) = self.pick(*index) else { return };
                if self.waits_otherwise(&ask).await {
                    return;
                }
                self.acquire(&ask).await;
            }
            Step::Release(index) => {
                let Some(ask) = self.pick(*index) else { return };
                for _ in 0..2 {
                    let memory = self.memory.backend.release(&ask.part).await.unwrap();
                    let redis = self.redis.backend.release(&ask.part).await.unwrap();
                    assert_eq!(memory, redis);
                }
            }
            Step::Cancel(index) => {
                let Some(ask) = self.pick(*index) else { return };
                for _ in 0..2 {
                    self.memory.backend.cancel(&ask.part).await.unwrap();
                    self.redis.backend.cancel(&ask.part).await.unwrap();
                }
            }
            Step::Renew(picked) => {
                let picked = picked.iter().filter_map(|(at, w)| Some((self.pick(*at)?, *w)));
                let picked: Vec<_> = picked.collect();
                for _ in 0..2 {
                    assert_eq!(self.memory.renew(&picked).await, self.redis.renew(&picked).await);
                }
            }
            Step::Lapse => self.lapse().await,
        }
        self.compare().await;
    }

    /// The request of a step; none when it has no keys.
    async fn make(&mut self, step: &Step) -> Option<Acquire> {
        let Step::Acquire { owner, wants, wait, incremental, limit, short, block, metadata } = step
        else {
            return None;
        };
        let owner = self.owners[*owner];
        let modes = wants.map(|want| match want {
            0..=3 => None,
            4 | 5 => Some(Mode::Shared),
            _ => Some(Mode::Exclusive),
        });
        let pairs = KEYS.iter().zip(modes);
        let mut wants: Vec<_> =
            pairs.filter_map(|(name, mode)| Some(Want::new(key(name), mode?))).collect();
        wants.sort();
        let ask = Acquire {
            part: Part { partition: P0, owner, request: RequestId::next(), wants: wants.into() },
            client: self.memory.client.id,
            lease: lease(if *short { SHORT } else { LONG }),
            standing: if *incremental { Standing::Incremental } else { Standing::Fresh },
            wait: *wait,
            floor: None,
            limit: *limit,
            block: *block,
            metadata: metadata.clone(),
        };
        (!ask.part.wants.is_empty() && !self.waits_otherwise(&ask).await).then_some(ask)
    }

    /// Whether a request would wait while another one of its owner does, which clients never let
    /// happen.
    async fn waits_otherwise(&mut self, ask: &Acquire) -> bool {
        let seen = self.memory.inspect().await;
        self.memory.tokens.clear();
        let mut waits = seen.iter().filter(|line| {
            line.contains(&format!("for by {}", ask.part.owner))
                && !line.contains(&ask.part.request.to_string())
        });
        ask.wait && waits.next().is_some()
    }

    async fn acquire(&mut self, ask: &Acquire) {
        if ask.lease == lease(SHORT) {
            self.first_short.get_or_insert_with(Instant::now);
        }
        let memory = self.memory.acquire(ask).await;
        assert_eq!(memory, self.redis.acquire(ask).await, "{ask:?}");
        let again = self.memory.acquire(ask).await;
        assert_eq!(again, self.redis.acquire(ask).await, "sent again: {ask:?}");
        assert_eq!(memory, again, "a copy changes nothing: {ask:?}");
    }

    async fn lapse(&mut self) {
        let short = self.asks.iter().filter(|ask| ask.lease == lease(SHORT));
        let short: Vec<_> = short.map(|ask| ask.part.request.to_string()).collect();
        wait_until("all short leases have lapsed", SOON, async || {
            let mut seen = self.memory.inspect().await;
            seen.extend(self.redis.inspect().await);
            !seen.iter().any(|line| short.iter().any(|request| line.contains(request)))
        })
        .await;
        self.memory.tokens.clear();
        self.redis.tokens.clear();
        self.first_short = None;
        let waiting: Vec<_> = self.asks.iter().map(|ask| (ask.clone(), true)).collect();
        for _ in 0..2 {
            self.memory.renew(&waiting).await;
            self.redis.renew(&waiting).await;
        }
    }

    /// What can be seen from outside is the same.
    async fn compare(&mut self) {
        if self.lapses && self.first_short.is_some() {
            // A lease may lapse at any time, and each side finds it when it looks: what was pushed
            // so far is compared at rest.
            assert_eq!(self.memory.inspect().await, self.redis.inspect().await);
        } else {
            let (memory, redis) = (self.memory.handed_over().await, self.redis.handed_over().await);
            let told = |overs: &[HandOver]| -> Vec<_> {
                let mut told: Vec<_> =
                    overs.iter().map(|over| (over.owner, over.grant.request)).collect();
                if self.lapses {
                    told.sort();
                }
                told
            };
            assert_eq!(told(&memory), told(&redis), "hand-overs");
            let (here, there) = (self.memory.followed(), self.redis.followed());
            assert!(here == there || self.lapses, "followed: {here:?}, {there:?}");
            for (over, other) in memory.iter().zip(&redis).filter(|_| !self.lapses) {
                let part = self.asks.iter().find(|ask| ask.part.request == over.grant.request);
                let part = part.unwrap().part.clone();
                self.memory.note(&part, &over.grant);
                self.redis.note(&part, &other.grant);
            }
            assert_eq!(self.memory.inspect().await, self.redis.inspect().await);
        }
        self.compare_tokens();
    }

    /// The same token here is the same token there, and they grow in the same order.
    fn compare_tokens(&mut self) {
        let memory = std::mem::take(&mut self.memory.tokens);
        let redis = std::mem::take(&mut self.redis.tokens);
        assert_eq!(memory.len(), redis.len());
        for ((key, here, block), (other, there, reserved)) in memory.into_iter().zip(redis) {
            assert_eq!(key, other);
            let key = self.lapses.then_some(key);
            let known = *self.pairs.entry((key.clone(), here)).or_insert(there);
            assert_eq!(known, there, "one token here, two there");
            // The counters may be ahead of two clocks that differ a little: then one of the two has
            // no tokens to spare.
            let alike = block == reserved && block > 1;
            assert!(alike || block.min(reserved) == 1 || self.lapses, "{block}, {reserved}");
            if alike {
                // The last token that is reserved is as much in use as the first.
                let last = |first: FencingToken| first.get() + u64::from(block) - 1;
                let [here, there] = [here, there].map(|at| FencingToken::new(last(at)).unwrap());
                self.pairs.insert((key, here), there);
                self.blocks += 1;
            }
        }
        let ordered: Vec<_> = self.pairs.iter().collect();
        for pair in ordered.windows(2) {
            let [((key, _), here), ((next, _), there)] = pair else { unreachable!() };
            assert!(key != next || here < there, "tokens grow in another order");
        }
    }
}

/// Runs `cases` random sequences of about `steps` steps. `PALISADE_SEED` sets the seed, and
/// `PALISADE_CASES` how many times as many cases are run.
fn run(cases: u32, steps: usize, lapses: bool) {
    let times = std::env::var("PALISADE_CASES").ok().and_then(|times| times.parse().ok());
    let cases = cases * times.unwrap_or(1);
    let seed = std::env::var("PALISADE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("PALISADE_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, rng);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let server = RedisServer::start();
    let redis = runtime.block_on(connect(&server));
    let blocks = AtomicUsize::new(0);
    let outcome = runner.run(&vec(step(lapses), 1..=2 * steps), |steps| {
        let memory = MemoryBackend::new();
        // A sequence that failed has left something; while it is made shorter, each starts afresh.
        server.command(&["FLUSHALL"]);
        runtime.block_on(async {
            let mut pair = Pair::new(&memory, &redis, lapses).await;
            for step in &steps {
                if pair
                    .first_short
                    .is_some_and(|at| at.elapsed() > Duration::from_millis(SHORT / 2))
                {
                    pair.lapse().await;
                    pair.compare().await;
                }
                pair.take(step).await;
            }
            if lapses {
                pair.lapse().await;
                pair.compare().await;
            }
            for ask in pair.asks.clone() {
                memory.cancel(&ask.part).await.unwrap();
                redis.cancel(&ask.part).await.unwrap();
            }
            redis.unsubscribe(pair.redis.client.id);
            blocks.fetch_add(pair.blocks, Ordering::Relaxed);
        });
        let left = left(&server);
        let left: Vec<_> = left
            .iter()
            // Metadata of what has lapsed stays a little longer, and the memory of what was
            // cancelled.
            .filter(|name| !(name.contains(":x:") || lapses && name.contains(":m:")))
            .collect();
        assert!(left.is_empty(), "{left:?}");
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("PALISADE_SEED={seed}: {error}");
    }
    assert!(blocks.into_inner() > 0, "no block of tokens was compared");
}

#[test]
fn redis_answers_as_the_memory_backend_does() {
    run(200, 40, false);
}

#[test]
fn redis_answers_as_the_memory_backend_does_where_leases_lapse() {
    run(12, 40, true);
}
