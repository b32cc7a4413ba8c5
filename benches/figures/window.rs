//! One side at work for a while, and what that took.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use tokio::task::JoinSet;

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

/// Reads the clocks and counters around a window.
pub struct Meter<'a> {
    server: &'a RedisServer,
    server_us: f64,
    sent: f64,
    client_us: f64,
    start: Instant,
}

impl<'a> Meter<'a> {
    pub fn start(server: &'a RedisServer) -> Self {
        let (server_us, sent) = ask(server);
        Self { server, server_us, sent, client_us: client_us(), start: Instant::now() }
    }

    pub fn stop(self, done: u64) -> Window {
        let (seconds, client_us) = (self.start.elapsed().as_secs_f64(), client_us());
        let (server_us, sent) = ask(self.server);
        Window {
            done: done as f64,
            seconds,
            client_us: client_us - self.client_us,
            server_us: server_us - self.server_us,
            sent: sent - self.sent,
        }
    }
}

/// Each of `steps` is repeated by a task of its own until the window closes.
pub async fn repeat<F, Fut>(server: &RedisServer, window: Duration, steps: Vec<F>) -> Window
where
    F: Fn() -> Fut + Send + 'static,
    Fut: Future<Output = ()> + Send,
{
    let meter = Meter::start(server);
    let until = Instant::now() + window;
    let mut tasks = JoinSet::new();
    for step in steps {
        tasks.spawn(async move {
            let mut done = 0;
            while Instant::now() < until {
                step().await;
                done += 1;
            }
            done
        });
    }
    let done: Vec<u64> = tasks.join_all().await;
    meter.stop(done.iter().sum())
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
