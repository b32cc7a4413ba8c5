//! W1: counters that many processes add to by reading, thinking and writing back. With the fence,
//! no update is lost, whatever happens to the processes and to the lock service; without it, some
//! are.
//!
//! Each write is signed: a row with the name of the operation is committed together with the
//! counter. Two operations that wrote the same value have read the same value, so one of them is
//! lost, and the rows say which.

mod client;
mod nemesis;
pub mod oracle;
pub mod store;

use std::time::Duration;

use futures_util::future::join_all;
use palisade::ErrorKind;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::crew::{Member, Pool};
use crate::findings::Findings;
use crate::history::{self, Outcome};
use crate::stage::{Backend, Stage};
use crate::worker::{Settings, Work};

use client::Client;
pub use client::worker;
use nemesis::Nemesis;
use oracle::Phase;
use store::{COUNTERS, Store};

const PROCESSES: usize = 4;
const TASKS: usize = 4;
const LEASE: Duration = Duration::from_secs(1);

/// One addition, as its worker knows it. It is written down when its locks were granted, and again
/// when it has ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Operation {
    pub id: String,
    pub key: String,
    pub started: u64,
    pub granted: Option<u64>,
    pub ended: Option<u64>,
    pub outcome: Outcome,
    /// How it failed.
    pub why: Option<Failure>,
    pub token: Option<u64>,
    pub owner: Option<String>,
    pub read: Option<i64>,
    pub written: Option<i64>,
    /// Whether it is the last of its task, after everything was healed.
    pub last: bool,
    /// Whether it began without the lock service.
    pub degraded: bool,
}

/// What stood in the way of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Failure {
    /// The store had seen a newer holder.
    Stale,
    /// The lease was lost, and the worker knew.
    Lost,
    Other(String),
}

impl Operation {
    /// One that begins now.
    pub fn new(id: String, key: &str, last: bool) -> Self {
        Self {
            id,
            key: key.to_owned(),
            started: crate::clock::now(),
            granted: None,
            ended: None,
            outcome: Outcome::Unknown,
            why: None,
            token: None,
            owner: None,
            read: None,
            written: None,
            last,
            degraded: false,
        }
    }

    pub fn reads(&mut self, value: i64) {
        self.read = Some(value);
        self.written = Some(value + 1);
    }

    /// Notes how it ended.
    pub fn ends(&mut self, answer: palisade::Result<()>) {
        self.ended = Some(crate::clock::now());
        self.outcome = match &answer {
            Ok(()) => Outcome::Ok,
            Err(error) if error.is_in_doubt() => Outcome::Unknown,
            Err(_) => Outcome::No,
        };
        self.why = answer.err().map(|error| match error.kind() {
            ErrorKind::StaleToken => Failure::Stale,
            ErrorKind::LeaseLost => Failure::Lost,
            _ => Failure::Other(format!("{error:?}")),
        });
    }
}

/// Runs W1: first with the fence, then a fifth of the time without it.
pub async fn run(stage: &Stage) -> Result<Findings> {
    let store = Store::open(&stage.store(), TASKS).await?;
    store.create().await?;
    let mut findings = Findings::default();
    let control_time = if stage.control { stage.time } else { stage.time / 5 };
    let control_time = control_time.max(Duration::from_secs(5));
    if !stage.control {
        let phase = play(stage, &store, true, stage.time - control_time).await?;
        let bites = phase.stale + phase.lost_leases;
        let seconds = stage.time.as_secs();
        findings.ok = phase.ok;
        findings.unknown = phase.unknown;
        findings.lost = phase.lost;
        findings.bites = bites;
        findings.figures.insert("stale", phase.stale);
        findings.figures.insert("lost_leases", phase.lost_leases);
        findings.figures.insert("ended_sessions", store.ended_sessions().await?);
        findings.need("bites", bites, seconds / 2);
        findings.need("stale", phase.stale, (seconds * 5).div_ceil(60));
        findings.violations = phase.violations;
    }
    let control = play(stage, &store, false, control_time).await?;
    findings.figures.insert("control_ok", control.ok);
    findings.figures.insert("control_lost", control.lost);
    findings.need("control_lost", control.lost, 1);
    Ok(findings)
}

/// One phase: workers, nemesis, healing, oracle.
async fn play(stage: &Stage, store: &Store, fenced: bool, time: Duration) -> Result<Phase> {
    let prefix = if fenced { "fenced" } else { "control" };
    let keys: Vec<String> = (0..COUNTERS).map(|n| format!("{prefix}-{n}")).collect();
    store.add_counters(&keys).await?;
    let settings = |name: String, tasks: usize, part: u64| Settings {
        work: Work::Counter { fenced },
        name: format!("{prefix}-{name}"),
        directory: stage.directory().to_owned(),
        locks: stage.locks(),
        store: stage.store(),
        lease: LEASE,
        tasks,
        seed: stage.random(part).u64(..),
    };
    let mut members = Vec::new();
    for n in 0..PROCESSES {
        members.push(Member::start(settings(format!("w{n}"), TASKS, n as u64)).await?);
    }
    // It takes what a stopped worker holds, and is never hurt itself.
    let rival = Client::open(settings("rival".to_owned(), 1, 9), fenced).await?;
    let pool = Pool::new(members);
    let nemesis = Nemesis { stage, pool: &pool, rival: &rival, until: time };
    nemesis.rage().await?;
    // What a worker that was killed last held is free again.
    tokio::time::sleep(LEASE).await;
    let mut failed = Vec::new();
    for ended in join_all(pool.dissolve().into_iter().map(Member::end)).await {
        match ended {
            Ok(status) if status.success() => {}
            Ok(status) => failed.push(format!("a worker failed: {status}; see its log")),
            Err(error) => failed.push(error.to_string()),
        }
    }
    let operations = history::read(stage.directory(), &format!("{prefix}-"))?;
    let rows = store.rows(&format!("{prefix}-")).await?;
    let counters = store.counters(&format!("{prefix}-")).await?;
    let last = if failed.is_empty() { PROCESSES * TASKS } else { 0 };
    let mut phase = oracle::judge(operations, &rows, &counters, last);
    phase.violations.extend(failed);
    // What the oracle saw of the store is kept beside the histories.
    let seen = history::History::open(stage.directory(), &format!("store-{prefix}"))?;
    rows.iter().for_each(|row| seen.note(row));
    seen.note(&counters);
    Ok(phase)
}

/// Whether a process that stops with a branch open keeps the others out of the store.
fn blocks(backend: Backend) -> bool {
    backend == Backend::Memory
}
