//! What all worker processes have in common: they are told what to do by lines on their input, say
//! how far they are by lines on their output, and stop themselves where they are asked to.

use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use palisade::Locks;
use rustix::process::{Signal, getpid, kill_process, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};
use tokio::runtime::Builder;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Instant, sleep};

use crate::history::History;
use crate::{Result, clock, counter, degraded, exclusion};

/// How long a server may be away before a worker gives up connecting to it.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a worker is started with.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    pub work: Work,
    /// Names the worker and its history.
    pub name: String,
    pub directory: PathBuf,
    pub locks: String,
    pub store: String,
    pub lease: Duration,
    pub tasks: usize,
    pub seed: u64,
}

/// Which work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    Counter {
        fenced: bool,
    },
    Exclusion,
    Degraded {
        fenced: bool,
        /// Whether it will be cut off; in one process, half of its tasks are.
        cut: bool,
    },
}

/// What a worker is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Stop yourself at the next seam.
    Stop,
    /// Keep the next key until you lose it.
    Hold,
    /// Empty the memory of the lock service, where that is yours.
    Forget,
    /// You are cut off from the lock service from now on, or you can cut it off yourself,
    Cut,
    /// until now.
    Heal,
    /// No more of that: end what is under way, do one last operation per task, and end.
    Last,
}

/// What a worker says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Word {
    Ready,
    /// It holds this key and stops itself now.
    Stopping {
        key: String,
    },
    /// It keeps a key now until it loses it.
    Holding,
    Forgot,
}

impl Settings {
    pub fn history(&self) -> Result<History> {
        History::open(&self.directory, &self.name)
    }

    /// Connects to the lock service, also to one that is being restarted.
    pub async fn connect(&self) -> Result<Locks> {
        let started = Instant::now();
        loop {
            match palisade::connect(&self.locks).await {
                Err(error) if error.is_unavailable() && started.elapsed() < PATIENCE => {
                    sleep(Duration::from_millis(20)).await;
                }
                answer => return Ok(answer?),
            }
        }
    }
}

/// The whole life of a worker process. It has one thread that works, so that a stop which it sends
/// itself takes effect before it goes on.
pub fn main(settings: &str) -> ExitCode {
    set_parent_process_death_signal(Some(Signal::KILL)).unwrap();
    let settings: Settings = serde_json::from_str(settings).unwrap();
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let orders = orders();
    let work = async {
        match settings.work {
            Work::Counter { fenced } => counter::worker(settings, fenced, orders).await,
            Work::Degraded { fenced, cut } => degraded::worker(settings, fenced, cut, orders).await,
            Work::Exclusion => exclusion::worker(settings, orders).await,
        }
    };
    match runtime.block_on(work) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// The lines of the input. When it ends, the conductor is gone, and nobody wants the work.
fn orders() -> UnboundedReceiver<Order> {
    let (sender, orders) = unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let order = serde_json::from_str(&line.unwrap()).unwrap();
            if sender.send(order).is_err() {
                return;
            }
        }
        std::process::exit(3);
    });
    orders
}

pub fn say(word: &Word) {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, word).unwrap();
    out.write_all(b"\n").unwrap();
    out.flush().unwrap();
}

/// A place where a worker can be made to stop.
#[derive(Debug, Default)]
pub struct Seam(AtomicBool);

impl Seam {
    pub fn arm(&self, armed: bool) {
        self.0.store(armed, Ordering::SeqCst);
    }

    /// Whether whoever comes by is to stop; only the first is.
    pub fn is_due(&self) -> bool {
        self.0.swap(false, Ordering::SeqCst)
    }

    /// Stops this process until it is continued. Returns for how long that was, in nanoseconds.
    pub fn stop(&self, key: &str) -> u64 {
        say(&Word::Stopping { key: key.to_owned() });
        let before = clock::now();
        kill_process(getpid(), Signal::STOP).unwrap();
        clock::now() - before
    }
}
