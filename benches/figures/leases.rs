//! What it takes to keep what is held, and to go on waiting.

use std::time::Duration;

use palisade::{LockGuard, Locks};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::pairs::Spread;
use crate::report::{Figure, Goal};
use crate::support::{RedisServer, wait_until};
use crate::window::Reading;
use crate::{Bench, heap, multi_thread};

const LEASES: usize = 10_000;
const LEASE: Duration = Duration::from_secs(10);
const WAITERS: usize = 1_000;

/// A waiter says that it still waits every third of its lease.
const REFRESH: Duration = Duration::from_millis(3_334);

/// Many leases, renewed for a while.
pub fn run_renewal(bench: &mut Bench) {
    let server = RedisServer::start();
    let window = bench.window(6_700, 20_000);
    bench.report.measuring(format!("renewal: {LEASES} leases"));
    let figures = multi_thread().block_on(async {
        let locks = palisade::connect(&server.url()).await.expect("a lock service");
        // What is allocated once is not the lease's.
        drop(hold(&locks, "warm", 64).await);
        let (guards, bytes) = heap::growth(hold(&locks, "lease", LEASES)).await;
        let start = Reading::take(&server, || locks.statistics().renewed);
        sleep(window).await;
        let measured = Reading::take(&server, || locks.statistics().renewed).since(&start);
        let lost = guards.iter().filter(|guard| !guard.locked().is_held()).count();
        let lost = lost.max(usize::try_from(locks.statistics().lost).expect("a count"));
        [
            figure("renew_commands_per_s", measured.sent / measured.seconds, 40.0),
            figure("renew_lost", lost as f64, 0.0),
            figure("renew_cpu_us", measured.client_us_each(), 3.0)
                .beside("renewals_per_s", measured.per_second())
                .beside("server_us", measured.server_us_each()),
            figure("lease_bytes", bytes / LEASES as f64, 1_024.0),
        ]
    });
    bench.report.add(figures);
}

fn figure(name: &'static str, value: f64, at_most: f64) -> Figure {
    let figure = Figure::new(name, Spread::of([value])).at("leases", LEASES);
    figure.at("lease_s", LEASE.as_secs()).goal(Goal::AtMost(at_most))
}

/// Locks that many keys, each by a request of its own.
async fn hold(locks: &Locks, what: &'static str, count: usize) -> Vec<LockGuard> {
    const TASKS: usize = 50;
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let locks = locks.clone();
        tasks.spawn(async move {
            let mut guards = Vec::new();
            for number in (task..count).step_by(TASKS) {
                let request = locks.lock(format!("{what}:{number}")).ttl(LEASE);
                guards.push(request.acquire().await.expect("a free key"));
            }
            guards
        });
    }
    let mut guards = Vec::with_capacity(count);
    while let Some(some) = tasks.join_next().await {
        guards.extend(some.expect("it does not panic"));
    }
    guards
}

/// Many waiters whose turn does not come.
pub fn run_idle(bench: &mut Bench) {
    let server = RedisServer::start();
    let intervals = if bench.quick { 1 } else { 6 };
    bench.report.measuring(format!("idle: {WAITERS} waiters"));
    let sent = multi_thread().block_on(async {
        let holder = palisade::connect(&server.url()).await.expect("a lock service");
        let long = Duration::from_secs(3_600);
        let guard = holder.lock("account:hot").ttl(long).acquire().await.expect("a free key");
        let locks = crate::locks_without_hand_over(&server).await;
        let mut waiting = JoinSet::new();
        for _ in 0..WAITERS {
            waiting.spawn(locks.lock("account:hot").ttl(LEASE).wait(long).acquire());
        }
        wait_until("all stand in line", Duration::from_secs(20), async || {
            let seen = holder.inspect("account:hot").await.expect("a look at the line");
            seen.waiters.len() == WAITERS
        })
        .await;
        // The first refreshes are spread as the requests were; later ones go together.
        sleep(REFRESH).await;
        let start = Reading::take(&server, || 0);
        sleep(REFRESH * intervals).await;
        let measured = Reading::take(&server, || u64::from(intervals)).since(&start);
        waiting.abort_all();
        drop(guard);
        measured.sent_each()
    });
    let idle = Figure::new("idle_commands", Spread::of([sent])).at("waiters", WAITERS);
    bench.report.add([idle.goal(Goal::AtMost(20.0))]);
}
