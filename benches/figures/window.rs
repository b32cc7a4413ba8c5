//! One side at work for a while, and what that took.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::support::RedisServer;

/// What was done in a window and what it cost.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    pub done: f64,
    pub seconds: f64,
    /// CPU time of this process, in µs.
    pub client_us: f64,
    /// CPU time of the server, in µs.
    pub server_us: f64,
    /// Commands that clients sent to the server, not those that scripts ran there.
    pub sent: f64,
    /// What the task did that did least, and that number by that of the one that did most.
    pub fewest: f64,
    pub fairness: f64,
}

impl Window {
    pub fn per_second(&self) -> f64 {
        self.done / self.seconds
    }

    pub fn client_us_each(&self) -> f64 {
        self.client_us / self.done
    }

    pub fn sent_each(&self) -> f64 {
        self.sent / self.done
    }

    pub fn server_us_each(&self) -> f64 {
        self.server_us / self.done
    }
}

/// What clocks and counters showed at one moment.
pub struct Reading {
    server_us: f64,
    sent: f64,
    client_us: f64,
    at: Instant,
    done: u64,
}

impl Reading {
    /// The server is asked first, at the start of a window and at its end, so that what happens
    /// meanwhile is left out here and taken in there.
    pub fn take(server: &RedisServer, done: impl FnOnce() -> u64) -> Self {
        let (server_us, sent) = ask(server);
        Self { server_us, sent, client_us: client_us(), at: Instant::now(), done: done() }
    }

    /// What happened since.
    pub fn since(self, start: &Self) -> Window {
        Window {
            done: (self.done - start.done) as f64,
            seconds: (self.at - start.at).as_secs_f64(),
            client_us: self.client_us - start.client_us,
            server_us: self.server_us - start.server_us,
            sent: self.sent - start.sent,
            fewest: 0.0,
            fairness: 0.0,
        }
    }
}

/// Each of `steps` is repeated by a task of its own. The window opens when all are under way and
/// closes before the first one stops, so neither start nor end is in the figures.
pub async fn steady<F, Fut>(server: &RedisServer, window: Duration, steps: Vec<F>) -> Window
where
    F: Fn() -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send,
{
    let done: Arc<[AtomicU64]> = steps.iter().map(|_| AtomicU64::new(0)).collect();
    let over = Arc::new(AtomicBool::new(false));
    let mut tasks = JoinSet::new();
    for (task, step) in steps.into_iter().enumerate() {
        let (done, over) = (Arc::clone(&done), Arc::clone(&over));
        tasks.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                step().await;
                done[task].fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let count = || done.iter().map(|done| done.load(Ordering::Relaxed)).collect::<Vec<u64>>();
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let read = |counts: &mut Vec<u64>| {
        Reading::take(server, || {
            *counts = count();
            counts.iter().sum()
        })
    };
    sleep(window / 5).await;
    let start = read(&mut before);
    sleep(window).await;
    let measured = read(&mut after).since(&start);
    let each: Vec<u64> = after.iter().zip(before).map(|(after, before)| after - before).collect();
    over.store(true, Ordering::Relaxed);
    tasks.join_all().await;
    let (fewest, most) = (each.iter().min().copied(), each.iter().max().copied());
    let fairness = fewest.unwrap_or(0) as f64 / most.unwrap_or(0).max(1) as f64;
    Window { fewest: fewest.unwrap_or(0) as f64, fairness, ..measured }
}

/// CPU time of all threads of this process: what `getrusage` reports, to the nanosecond.
fn client_us() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
}

/// The server's CPU time in µs, and the commands that it was sent.
fn ask(server: &RedisServer) -> (f64, f64) {
    // Our scripts, those of the bare client, and the token ring; no script runs any of these.
    const SENT: [&str; 4] = ["cmdstat_evalsha", "cmdstat_eval", "cmdstat_blpop", "cmdstat_rpush"];
    let (mut cpu, mut sent) = (0.0, 0.0);
    let info = server.command(&["INFO", "cpu", "commandstats"]);
    for (name, value) in info.lines().filter_map(|line| line.split_once(':')) {
        let number = |text: &str| text.trim().parse::<f64>().expect("a number");
        if matches!(name, "used_cpu_user" | "used_cpu_sys") {
            cpu += number(value) * 1e6;
        } else if SENT.contains(&name) {
            let calls = value.strip_prefix("calls=").and_then(|rest| rest.split(',').next());
            sent += number(calls.expect("the number of calls"));
        }
    }
    (cpu, sent)
}
