//! One key that everybody wants: from one holder to the next.

use std::sync::Arc;
use std::time::Duration;

use palisade::Locks;
use redis::aio::MultiplexedConnection;
use tokio::time::sleep;

use crate::bare::BareLocks;
use crate::pairs::{Pairs, Spread, alternate};
use crate::report::{Figure, Goal};
use crate::support::RedisServer;
use crate::window::{Window, steady};
use crate::{Bench, bare, multi_thread};

const WAITERS: [usize; 2] = [16, 256];
const SECTION: Duration = Duration::from_millis(1);

/// So often each waiter must have had its turn before fairness means anything.
const TURNS: f64 = 50.0;

/// Longer than any waiter waits here.
const PATIENCE: Duration = Duration::from_secs(60);

pub fn run(bench: &mut Bench) {
    let server = RedisServer::start();
    let windows = [bench.window(400, 1_500), bench.window(400, 2_000)];
    let (mut ratios, mut fairness, mut commands) = (Vec::new(), Vec::new(), Vec::new());
    multi_thread().block_on(async {
        let locks = crate::locks_without_hand_over(&server).await;
        for (waiters, window) in WAITERS.into_iter().zip(windows) {
            bench.report.measuring(format!("hand-over: {waiters} waiters"));
            let ring = ring(&server, waiters).await;
            let pairs = against_ring(&server, &locks, &ring, window, SECTION).await;
            ratios.push(ratio("handover_ratio", waiters, &pairs).goal(Goal::AtLeast(0.95)));
            commands.push(sent(waiters, &pairs));
            if waiters == WAITERS[0] || !bench.quick {
                let rate = pairs.ours(Window::per_second).median;
                let long = Duration::from_secs_f64(TURNS * 1.2 * waiters as f64 / rate);
                let ours = queue_up(&server, long, &locks, waiters, SECTION).await;
                let rings = pass_token(&server, long, &ring, SECTION).await;
                fairness.push(fair(waiters, ours, rings));
            }
        }
        if !bench.quick {
            bench.report.measuring("hand-over: polling".to_owned());
            let polls = polling(&server, windows[0], WAITERS[0]).await;
            let named = |figure: Figure| figure.at("client", "bare scripts that poll");
            ratios.push(named(ratio("handover_ratio", WAITERS[0], &polls)));
            let shares = polls.ours(|window| window.fairness);
            fairness
                .push(named(Figure::new("handover_fairness", shares).at("waiters", WAITERS[0])));
        }
    });
    bench.report.add(ratios.into_iter().chain(fairness).chain(commands));
}

/// One process that wants one key as often as it can get it.
pub fn run_local(bench: &mut Bench) {
    let server = RedisServer::start();
    let window = bench.window(300, 1_000);
    let figures = multi_thread().block_on(async {
        let locks = palisade::connect(&server.url()).await.expect("a lock service");
        let mut figures = Vec::new();
        // Quickly, the smaller crowd only: a connection for each of many takes a while.
        for waiters in WAITERS.into_iter().take(if bench.quick { 1 } else { 2 }) {
            bench.report.measuring(format!("local hand-over: {waiters} waiters"));
            let ring = ring(&server, waiters).await;
            let pairs = against_ring(&server, &locks, &ring, window, Duration::ZERO).await;
            let figure = ratio("local_handover_ratio", waiters, &pairs);
            figures.push(figure.goal(Goal::AtLeast(10.0)));
        }
        figures
    });
    bench.report.add(figures);
}

async fn against_ring(
    server: &RedisServer,
    locks: &Locks,
    ring: &[MultiplexedConnection],
    window: Duration,
    section: Duration,
) -> Pairs {
    let ours = async || queue_up(server, window, locks, ring.len(), section).await;
    let bare = async || pass_token(server, window, ring, section).await;
    alternate(ours, bare).await
}

/// Work under the lock that keeps no worker of the runtime busy. A thread sleeps to the microsecond
/// where tokio's timer rounds up to the next millisecond, and would hide what comes after.
async fn critical_section(length: Duration) {
    if !length.is_zero() {
        let work = tokio::task::spawn_blocking(move || std::thread::sleep(length));
        work.await.expect("it sleeps");
    }
}

async fn queue_up(
    server: &RedisServer,
    window: Duration,
    locks: &Locks,
    waiters: usize,
    section: Duration,
) -> Window {
    let step = || {
        let locks = locks.clone();
        move || {
            let request = locks.lock("account:hot").wait(PATIENCE);
            async move {
                let guard = request.acquire().await.expect("a turn");
                critical_section(section).await;
                guard.release().await.expect("it is still held");
            }
        }
    };
    steady(server, window, (0..waiters).map(|_| step()).collect()).await
}

/// A connection for each waiter, which is blocked while it waits.
async fn ring(server: &RedisServer, waiters: usize) -> Vec<MultiplexedConnection> {
    let mut ring = Vec::with_capacity(waiters);
    for _ in 0..waiters {
        ring.push(bare::connect(&server.url()).await);
    }
    ring
}

/// A list with one element: whoever has it may go on. The server serves who waits longest.
async fn pass_token(
    server: &RedisServer,
    window: Duration,
    ring: &[MultiplexedConnection],
    section: Duration,
) -> Window {
    server.command(&["DEL", "ring"]);
    server.command(&["RPUSH", "ring", "token"]);
    let step = |connection: &MultiplexedConnection| {
        let connection = connection.clone();
        move || {
            let mut connection = connection.clone();
            async move {
                let take = redis::cmd("BLPOP").arg("ring").arg(0).to_owned();
                let taken = take.query_async::<(String, String)>(&mut connection).await;
                taken.expect("the token");
                critical_section(section).await;
                let pass = redis::cmd("RPUSH").arg("ring").arg("token").to_owned();
                pass.query_async::<usize>(&mut connection).await.expect("it is passed on");
            }
        }
    };
    steady(server, window, ring.iter().map(step).collect()).await
}

/// What lock libraries without a line do: ask again after a random time, 200 ms at most. Whoever
/// has just given the key up gets it back before anybody asks, which is fast and far from fair.
async fn polling(server: &RedisServer, window: Duration, waiters: usize) -> Pairs {
    let locks = BareLocks::connect(&server.url()).await;
    let ring = ring(server, waiters).await;
    let keys: Arc<[String]> = Arc::new(["polled:hot".to_owned()]);
    let step = || {
        let (locks, keys) = (locks.clone(), Arc::clone(&keys));
        move || {
            let (locks, keys) = (locks.clone(), Arc::clone(&keys));
            async move {
                let grant = loop {
                    match locks.try_acquire(&keys).await {
                        Some(grant) => break grant,
                        None => sleep(Duration::from_millis(fastrand::u64(0..200))).await,
                    }
                };
                critical_section(SECTION).await;
                locks.release(&keys, grant).await;
            }
        }
    };
    let polls = async || steady(server, window, (0..waiters).map(|_| step()).collect()).await;
    alternate(polls, async || pass_token(server, window, &ring, SECTION).await).await
}

fn ratio(name: &'static str, waiters: usize, pairs: &Pairs) -> Figure {
    Figure::new(name, pairs.ratio())
        .at("waiters", waiters)
        .beside("per_s", pairs.ours(Window::per_second).median)
        .beside("bare_per_s", pairs.bare(Window::per_second).median)
        .beside("us", pairs.ours(Window::client_us_each).median)
        .beside("bare_us", pairs.bare(Window::client_us_each).median)
        .beside("server_us", pairs.ours(Window::server_us_each).median)
        .beside("bare_server_us", pairs.bare(Window::server_us_each).median)
}

fn sent(waiters: usize, pairs: &Pairs) -> Figure {
    Figure::new("handover_commands", pairs.ours(Window::sent_each))
        .at("waiters", waiters)
        .goal(Goal::AtMost(3.0))
        .beside("bare", pairs.bare(Window::sent_each).median)
}

fn fair(waiters: usize, ours: Window, ring: Window) -> Figure {
    Figure::new("handover_fairness", Spread::of([ours.fairness]))
        .at("waiters", waiters)
        .goal(Goal::AtLeast(0.9))
        .beside("fewest_grants", ours.fewest)
        .beside("bare", ring.fairness)
}
