//! Histories of many clients, checked against what a correct lock may answer.
//!
//! `PALISADE_HISTORY_FACTOR=8` makes every run eight times as long; `PALISADE_HISTORY_SEED` repeats
//! the choices of a run whose seed was printed (not how its tasks met).
//!
//! [`models`] says what a lock may answer, [`checker`] whether a history can be put in order;
//! neither knows the library. [`clients`] make histories: several services, each with owners that
//! two tasks share, acquire, try, enter again, release in any order, drop and look. [`broken`] has
//! services with bugs, which the same clients must bring to light.

mod broken;
mod checker;
mod clients;
mod handmade;
mod models;

use std::collections::BTreeMap;
use std::env;
use std::sync::Arc;
use std::time::{Duration, Instant};

use palisade::Locks;
use palisade::backend::{LockBackend, MemoryBackend, RedisBackend, RedisOptions};

use crate::redis_asks::SOON;
use crate::support::{Proxy, Rates, RedisServer, wait_until};
use broken::{Broken, Bug};
use checker::{Violation, check};
use clients::{Plan, Record};
use models::Model;

const SERVICES: usize = 3;
/// The most entries of one owner, where a lock is re-entrant.
const DEEP: usize = 3;

/// How often each answer was given.
type Answers = BTreeMap<String, usize>;

fn setting(name: &str) -> Option<u64> {
    env::var(name).ok().map(|text| text.parse().unwrap())
}

/// The seeds of as many histories as are asked for.
fn seeds(histories: u64) -> impl Iterator<Item = u64> {
    let seed = setting("PALISADE_HISTORY_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("PALISADE_HISTORY_SEED={seed}");
    let factor = setting("PALISADE_HISTORY_FACTOR").unwrap_or(1);
    (0..histories * factor).map(move |history| seed.wrapping_add(history))
}

/// What the services of one history use, which is new to them.
type Backends = Vec<Arc<dyn LockBackend>>;

async fn services(backends: Backends, plan: &Plan) -> Vec<Locks> {
    let mut services = Vec::new();
    for backend in backends {
        services.push(Locks::with_options(backend, plan.options()).await.unwrap());
    }
    services
}

/// All services share one.
fn shared(backend: impl LockBackend) -> Backends {
    let backend: Arc<dyn LockBackend> = Arc::new(backend);
    vec![backend; SERVICES]
}

/// Each service has a connection of its own to one database.
async fn connections(ports: [u16; SERVICES], database: usize) -> Backends {
    let mut backends: Backends = Vec::new();
    for port in ports {
        let url = format!("redis://127.0.0.1:{port}/{database}");
        let redis = RedisBackend::connect(&url, RedisOptions::default()).await.unwrap();
        backends.push(Arc::new(redis));
    }
    backends
}

/// Checks what was recorded against the models that apply.
fn verdict(record: Arc<Record>, plan: &Plan) -> Result<Answers, Violation> {
    let (histories, answers) = record.finish();
    for history in &histories {
        for fenced in [true, false] {
            check(Model { limit: plan.limit, fenced, copies: plan.lapses }, history)?;
        }
    }
    Ok(answers)
}

fn add(to: &mut Answers, answers: Answers) {
    for (name, times) in answers {
        *to.entry(name).or_default() += times;
    }
}

/// The run was about something.
fn assert_bites(answers: &Answers, expected: &[&str]) {
    for name in expected {
        assert!(answers.get(*name).is_some_and(|times| *times > 0), "no {name}: {answers:?}");
    }
}

/// One history without faults.
async fn history(
    seed: u64,
    steps: usize,
    limit: usize,
    backends: Backends,
) -> Result<Answers, String> {
    let plan = Plan::new(seed, steps, limit);
    let services = services(backends, &plan).await;
    let record = Record::new(plan);
    record.run(&services).await;
    record.last_operations(&services).await;
    verdict(record, &plan).map_err(|violation| format!("{plan:?}: {violation}"))
}

/// Histories without faults, of locks that are re-entrant and of others.
async fn all_are_in_order(histories: u64, steps: usize, backends: impl AsyncFn(usize) -> Backends) {
    let (mut total, started) = (Answers::new(), Instant::now());
    for (number, seed) in seeds(histories).enumerate() {
        let limit = if number % 2 == 0 { DEEP } else { 1 };
        let answers = history(seed, steps, limit, backends(number).await).await;
        add(&mut total, answers.unwrap_or_else(|violation| panic!("{violation}")));
    }
    println!("{:.1?}: {total:?}", started.elapsed());
    let expected = ["granted", "acquire Busy", "acquire LimitReached", "acquire Unknown"];
    assert_bites(&total, &expected);
    assert_bites(&total, &["release Done", "release Unknown", "seen", "seen re-entered"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_of_the_memory_backend_are_in_order() {
    all_are_in_order(4, 200, async |_| shared(MemoryBackend::new())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_of_redis_are_in_order() {
    let server = RedisServer::start_with(&["--databases", "1000"]);
    all_are_in_order(4, 120, async |number| connections([server.port(); SERVICES], number).await)
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_of_redis_behind_a_network_with_faults_are_in_order() {
    let server = RedisServer::start_with(&["--databases", "1000"]);
    let (mut total, mut struck, started) = (Answers::new(), 0, Instant::now());
    for (number, seed) in seeds(1).enumerate() {
        let proxies = [
            Proxy::start(server.port()).await,
            Proxy::start(server.port()).await,
            Proxy::start(server.port()).await,
        ];
        let lease = Duration::from_secs(2);
        let call_timeout = Duration::from_millis(250);
        let plan =
            Plan { lease, call_timeout, patience: SOON, lapses: true, ..Plan::new(seed, 16, DEEP) };
        let backends = connections(proxies.each_ref().map(Proxy::port), number).await;
        let services = services(backends, &plan).await;
        for (proxy, seed) in proxies.iter().zip(seed..) {
            // What nobody is told of costs the client several time-outs, so it is rarer.
            proxy.torment(seed, Rates { drop: 0.004, half_open: 0.004, ..Rates::each(0.01) });
        }
        let record = Record::new(plan);
        record.run(&services).await;
        for (proxy, locks) in proxies.iter().zip(&services) {
            proxy.calm();
            struck += proxy.struck().values().sum::<usize>();
            wait_until("the service answers again", SOON, async || {
                locks.inspect("a").await.is_ok()
            })
            .await;
        }
        record.last_operations(&services).await;
        let answers = verdict(record, &plan);
        add(&mut total, answers.unwrap_or_else(|violation| panic!("{plan:?}: {violation}")));
    }
    println!("{:.1?}: {struck} faults, {total:?}", started.elapsed());
    assert!(struck > 5, "{struck} faults are no torment");
    assert_bites(&total, &["granted", "acquire Unknown", "release Done", "release Unknown"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_clients_bring_every_planted_bug_to_light() {
    for bug in [Bug::ReleaseWithoutOwner, Bug::SameTokenTwice, Bug::EntriesNotCounted] {
        let mut found = None;
        for seed in seeds(20) {
            if let Err(violation) = history(seed, 100, DEEP, shared(Broken::new(bug))).await {
                found = Some(violation);
                break;
            }
        }
        println!("{bug:?}: {}", found.unwrap_or_else(|| panic!("{bug:?} is not found")));
    }
    let control = history(1, 100, DEEP, shared(Broken::new(Bug::None))).await;
    control.unwrap_or_else(|violation| panic!("without a bug: {violation}"));
}
