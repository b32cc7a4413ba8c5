//! W11: the counters of W1 while half of the workers are cut off from the lock service, again and
//! again. Those go on with nothing but the fence rows, beside the others who hold their locks, and
//! no update is lost at any switch. With the fence rows skipped there, some are.
//!
//! Whoever does not fall back hears of the outage within what it was ready to wait.
//!
//! Locks in memory are those of one process, so there half of its tasks are cut off.

mod client;

use std::collections::HashSet;
use std::time::Duration;

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use crate::Result;
use crate::counter::Operation;
use crate::counter::oracle::{self, Phase};
use crate::counter::store::{Row, Store};
use crate::crew::Member;
use crate::findings::Findings;
use crate::history;
use crate::stage::Stage;
use crate::support::Proxy;
use crate::worker::{Order, Settings, Work};

pub use client::worker;

const PROCESSES: usize = 4;
const TASKS: usize = 4;
/// Few, so that both ways often meet.
const KEYS: usize = 3;
const LEASE: Duration = Duration::from_secs(1);
/// How long a cut lasts, where there is time for it.
const CUT: Duration = Duration::from_secs(20);
/// How long a begin without a fallback is ready to wait for the lock service.
const BUDGET: Duration = Duration::from_millis(500);
/// What it may take beyond that.
const SLACK: Duration = Duration::from_millis(100);
/// What a busy machine may add, before it counts as a fault of the library.
const BUSY: Duration = Duration::from_secs(5);

/// A begin that does not fall back, while the worker was cut off.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Refusal {
    took: Duration,
    /// Whether it said that the lock service cannot be reached.
    named: bool,
}

/// Runs W11: first with the fence rows, then half of the time without them.
pub async fn run(stage: &Stage) -> Result<Findings> {
    let store = Store::open(&stage.store(), TASKS).await?;
    store.create().await?;
    let mut findings = Findings::default();
    let control_time = if stage.control { stage.time } else { stage.time / 2 };
    if !stage.control {
        let time = stage.time - control_time;
        let (phase, degraded) = play(stage, &store, true, time).await?;
        let refusals: Vec<Refusal> = history::read(stage.directory(), "refusals-")?;
        findings.ok = phase.ok;
        findings.unknown = phase.unknown;
        findings.lost = phase.lost;
        findings.bites = degraded.interleaved;
        findings.figures.insert("degraded", degraded.commits);
        findings.figures.insert("stale", phase.stale);
        findings.violations = phase.violations;
        judge(&refusals, &mut findings);
        let least = stage.time.as_secs() / 2;
        findings.need("degraded commits beside those under locks", degraded.interleaved, least);
    }
    let (control, _) = play(stage, &store, false, control_time).await?;
    findings.figures.insert("control_ok", control.ok);
    findings.figures.insert("control_lost", control.lost);
    findings.need("control_lost", control.lost, 1);
    Ok(findings)
}

/// Each refusal says why, and comes in time.
fn judge(refusals: &[Refusal], findings: &mut Findings) {
    let took: Vec<_> = refusals.iter().map(|refusal| refusal.took).collect();
    let worst = took.iter().max().copied().unwrap_or_default();
    let late = took.iter().filter(|took| **took > BUDGET + SLACK).count();
    findings.figures.insert("refused", refusals.len() as u64);
    findings.figures.insert("refused_worst_ms", worst.as_millis() as u64);
    findings.figures.insert("refused_late", late as u64);
    findings.need("refused", refusals.len() as u64, 4);
    for refusal in refusals {
        if !refusal.named || refusal.took > BUDGET + SLACK + BUSY {
            findings.violation(format!("without a fallback: {refusal:?}"));
        }
    }
}

/// What was done without the lock service.
#[derive(Debug, Default)]
struct Degraded {
    commits: u64,
    /// How often two neighbouring writes of one counter were made one way and the other.
    interleaved: u64,
}

/// One phase: workers, cuts, healing, oracle.
async fn play(
    stage: &Stage,
    store: &Store,
    fenced: bool,
    time: Duration,
) -> Result<(Phase, Degraded)> {
    let prefix = if fenced { "fenced" } else { "control" };
    let keys: Vec<String> = (0..KEYS).map(|n| format!("{prefix}-{n}")).collect();
    store.add_counters(&keys).await?;
    let proxy = match stage.redis() {
        Some(redis) => Some(Proxy::start(redis.port()).await),
        None => None,
    };
    let processes = if proxy.is_some() { PROCESSES } else { 1 };
    let mut members = Vec::new();
    for n in 0..processes {
        let cut = proxy.as_ref().filter(|_| n % 2 == 0);
        let proxied = cut.map(|proxy| format!("redis://127.0.0.1:{}", proxy.port()));
        let settings = Settings {
            work: Work::Degraded { fenced, cut: n % 2 == 0 },
            name: format!("{prefix}-w{n}"),
            directory: stage.directory().to_owned(),
            locks: proxied.unwrap_or_else(|| stage.locks()),
            store: stage.store(),
            lease: LEASE,
            tasks: TASKS * if proxy.is_some() { 1 } else { 2 },
            seed: stage.random(n as u64).u64(..),
        };
        members.push(Member::start(settings).await?);
    }
    cuts(&mut members, proxy.as_ref(), time).await;
    let mut failed = Vec::new();
    let tasks: usize = members.iter().map(|member| member.settings.tasks).sum();
    for ended in join_all(members.into_iter().map(Member::end)).await {
        match ended {
            Ok(status) if status.success() => {}
            Ok(status) => failed.push(format!("a worker failed: {status}; see its log")),
            Err(error) => failed.push(error.to_string()),
        }
    }
    let operations = history::read(stage.directory(), &format!("{prefix}-"))?;
    let rows = store.rows(&format!("{prefix}-")).await?;
    let counters = store.counters(&format!("{prefix}-")).await?;
    let degraded = Degraded::among(&operations, rows.clone());
    let last = if failed.is_empty() { tasks } else { 0 };
    let mut phase = oracle::judge(operations, &rows, &counters, last);
    phase.violations.extend(failed);
    Ok((phase, degraded))
}

/// Cuts half of the workers off for half of the time, twice at least; then heals.
async fn cuts(members: &mut [Member], proxy: Option<&Proxy>, time: Duration) {
    let cuts = (time.as_secs() / CUT.as_secs() / 2).max(2) as u32;
    let length = time / cuts / 2;
    for _ in 0..cuts {
        sleep(length).await;
        cut(members, proxy, true).await;
        sleep(length).await;
        cut(members, proxy, false).await;
    }
}

/// Workers are told, so that they know which outage they may complain of.
async fn cut(members: &mut [Member], proxy: Option<&Proxy>, cut: bool) {
    if let Some(proxy) = proxy.filter(|_| cut) {
        proxy.sever(true);
    }
    for member in members.iter_mut().step_by(2) {
        member.tell(if cut { Order::Cut } else { Order::Heal }).await;
    }
    if let Some(proxy) = proxy.filter(|_| !cut) {
        proxy.sever(false);
    }
}

impl Degraded {
    fn among(operations: &[Operation], mut rows: Vec<Row>) -> Self {
        let degraded: HashSet<&str> = operations
            .iter()
            .filter(|operation| operation.degraded)
            .map(|operation| operation.id.as_str())
            .collect();
        rows.sort_by(|a, b| (&a.key, a.value).cmp(&(&b.key, b.value)));
        let was = |id: &str| degraded.contains(id);
        let beside = rows
            .windows(2)
            .filter(|pair| pair[0].key == pair[1].key && was(&pair[0].id) != was(&pair[1].id));
        Self {
            interleaved: beside.count() as u64,
            commits: rows.iter().filter(|row| was(&row.id)).count() as u64,
        }
    }
}
