//! What it costs to watch the lock service, and how fast its loss and its return are acted on.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use palisade::backend::{LockBackend, MemoryBackend};
use palisade::{BreakerState, Coordinator, LockOptions, Locks, ResourceKey};
use tokio::time::{sleep, timeout};

use crate::pairs::Spread;
use crate::report::{Figure, Goal};
use crate::support::{RedisServer, wait_until};
use crate::{Bench, current_thread, multi_thread};

const KEY: &str = "account:cold";
const SOON: Duration = Duration::from_secs(20);

/// The same look at a key, with the breaker and the health around it and without.
pub fn run_bookkeeping(bench: &mut Bench) {
    bench.report.measuring("breaker: calls".to_owned());
    let calls = if bench.quick { 20_000 } else { 200_000 };
    let pairs = current_thread().block_on(async {
        let backend: Arc<dyn LockBackend> = Arc::new(MemoryBackend::new());
        let options = LockOptions::default();
        let locks = Locks::with_options(Arc::clone(&backend), options).await.expect("a service");
        let mut pairs = Vec::new();
        for _ in 0..11 {
            let begun = Instant::now();
            for _ in 0..calls {
                black_box(locks.inspect(KEY).await.expect("a look"));
            }
            let ours = begun.elapsed();
            let begun = Instant::now();
            for _ in 0..calls {
                let key = ResourceKey::parse(KEY).expect("a key");
                let partition = key.partition(backend.capabilities().partitions);
                let look = timeout(options.call_timeout, backend.inspect(partition, &key));
                black_box(look.await.expect("in time").expect("a look"));
            }
            pairs.push((ours, begun.elapsed()));
        }
        pairs
    });
    let more = |(ours, bare): (Duration, Duration)| {
        (ours.as_secs_f64() - bare.as_secs_f64()) * 1e9 / f64::from(calls)
    };
    let figure = Figure::new("breaker_call_ns", Spread::of(pairs.into_iter().map(more)));
    bench.report.add([figure.goal(Goal::AtMost(200.0))]);
}

/// Redis is killed, and comes back.
pub fn run(bench: &mut Bench) {
    let rounds = if bench.quick { 2 } else { 7 };
    bench.report.measuring("an outage of Redis".to_owned());
    let (mut fails, mut back) = (Vec::new(), Vec::new());
    multi_thread().block_on(async {
        let server = RedisServer::start();
        let locks = palisade::connect(&server.url()).await.expect("a lock service");
        let coordinator = Coordinator::builder(locks.clone()).build();
        for round in 0..rounds {
            server.kill();
            open(&locks).await;
            fails.push(fail(&coordinator).await);
            // So that it comes back at another moment between two pings each time.
            sleep(Duration::from_millis(700 + 130 * round)).await;
            server.restart_empty();
            let begun = Instant::now();
            wait_until("locks are granted again", SOON, async || {
                locks.lock(KEY).acquire().await.is_ok()
            })
            .await;
            back.push(begun.elapsed().as_secs_f64() * 1e3);
        }
    });
    bench.report.add([
        Figure::new("fail_fast_us", Spread::of(fails)).goal(Goal::AtMost(50.0)),
        Figure::new("back_after_ms", Spread::of(back)).goal(Goal::AtMost(1_000.0)),
    ]);
}

/// Asks until the breaker is open.
async fn open(locks: &Locks) {
    while locks.breaker_state() != BreakerState::Open {
        let ask = || async { drop(locks.lock(KEY).acquire().await) };
        tokio::join!(ask(), ask(), ask());
    }
}

/// How long begin takes to fail, in µs.
async fn fail(coordinator: &Coordinator) -> f64 {
    const TIMES: u32 = 1_000;
    let begun = Instant::now();
    for _ in 0..TIMES {
        let error = coordinator.transaction([KEY]).begin().await.expect_err("it is down");
        assert!(error.retry_after().is_some(), "{error}");
    }
    begun.elapsed().as_secs_f64() * 1e6 / f64::from(TIMES)
}
