//! Acquire and release of keys that nobody else wants.

use std::sync::Arc;
use std::time::Duration;

use palisade::Locks;
use tokio::runtime::Runtime;

use crate::bare::BareLocks;
use crate::pairs::{Pairs, alternate};
use crate::report::{Figure, Goal};
use crate::support::RedisServer;
use crate::window::{Window, steady};
use crate::{Bench, current_thread, multi_thread};

const KEYS: [usize; 4] = [1, 4, 16, 64];
const TASKS: [usize; 4] = [1, 16, 64, 256];

/// From here on, goals are higher: concurrent calls can share a message.
const MANY_TASKS: usize = 64;

struct Point {
    keys: usize,
    tasks: usize,
    pairs: Pairs,
}

pub fn run(bench: &mut Bench) {
    let points = measure(bench, "multi_thread", multi_thread(), bench.window(80, 500));
    bench.report.add(points.iter().map(|point| {
        let goal = if point.tasks >= MANY_TASKS { 1.0 } else { 0.85 };
        point.ratio().goal(Goal::AtLeast(goal))
    }));
    bench.report.add(points.iter().map(|point| point.cpu().goal(Goal::AtMost(5.0))));
    if !bench.quick {
        let window = Duration::from_millis(300);
        let points = measure(bench, "current_thread", current_thread(), window);
        let on_one_thread = |figure: Figure| figure.at("runtime", "current_thread");
        bench.report.add(points.iter().map(|point| on_one_thread(point.ratio())));
        bench.report.add(points.iter().map(|point| on_one_thread(point.cpu())));
    }
}

fn measure(bench: &Bench, runtime: &str, tokio: Runtime, window: Duration) -> Vec<Point> {
    let server = RedisServer::start();
    tokio.block_on(async {
        let locks = palisade::connect(&server.url()).await.expect("a lock service");
        let bare = BareLocks::connect(&server.url()).await;
        let mut points = Vec::new();
        for keys in KEYS {
            for tasks in TASKS {
                bench.report.measuring(format!("cycle: {keys} keys, {tasks} tasks, {runtime}"));
                let sets = key_sets(keys, tasks);
                let pairs = alternate(
                    async || cycle_ours(&server, window, &locks, &sets).await,
                    async || cycle_bare(&server, window, &bare, &sets).await,
                );
                points.push(Point { keys, tasks, pairs: pairs.await });
            }
        }
        points
    })
}

/// For each task, keys of its own.
fn key_sets(keys: usize, tasks: usize) -> Vec<Arc<[String]>> {
    let set = |task| (0..keys).map(|key| format!("account:{task}:{key}")).collect();
    (0..tasks).map(set).collect()
}

async fn cycle_ours(
    server: &RedisServer,
    window: Duration,
    locks: &Locks,
    sets: &[Arc<[String]>],
) -> Window {
    let step = |keys: &Arc<[String]>| {
        let (locks, keys) = (locks.clone(), Arc::clone(keys));
        move || {
            let request = locks.lock_all(&*keys);
            async move {
                let guard = request.acquire().await.expect("a key that nobody else wants");
                guard.release().await.expect("it is still held");
            }
        }
    };
    steady(server, window, sets.iter().map(step).collect()).await
}

async fn cycle_bare(
    server: &RedisServer,
    window: Duration,
    locks: &BareLocks,
    sets: &[Arc<[String]>],
) -> Window {
    let step = |keys: &Arc<[String]>| {
        let (locks, keys) = (locks.clone(), Arc::clone(keys));
        move || {
            let (locks, keys) = (locks.clone(), Arc::clone(&keys));
            async move {
                let grant = locks.try_acquire(&keys).await.expect("a key that nobody else wants");
                locks.release(&keys, grant).await;
            }
        }
    };
    steady(server, window, sets.iter().map(step).collect()).await
}

impl Point {
    fn ratio(&self) -> Figure {
        Figure::new("cycle_ratio", self.pairs.ratio())
            .at("keys", self.keys)
            .at("tasks", self.tasks)
            .beside("sent", self.pairs.ours(Window::sent_each).median)
            .beside("per_s", self.pairs.ours(Window::per_second).median)
            .beside("bare_per_s", self.pairs.bare(Window::per_second).median)
    }

    /// The client's CPU time for a cycle, less what the bare client takes.
    fn cpu(&self) -> Figure {
        let above = |ours: &Window, bare: &Window| ours.client_us_each() - bare.client_us_each();
        Figure::new("cycle_cpu_us", self.pairs.each(above))
            .at("keys", self.keys)
            .at("tasks", self.tasks)
            .beside("us", self.pairs.ours(Window::client_us_each).median)
            .beside("bare_us", self.pairs.bare(Window::client_us_each).median)
            .beside("server_us", self.pairs.ours(Window::server_us_each).median)
            .beside("bare_server_us", self.pairs.bare(Window::server_us_each).median)
    }
}
