//! What workers report, and what is made of it in the end.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::input::Transfer;

/// What a worker has done since its last report; `done` alone counts from its start. A worker that
/// is killed takes along what it has not reported yet, so times and counts are those of survivors.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// How many transfers of the worker's share are done, those of its predecessors among them.
    pub done: usize,
    pub finished: Vec<Timing>,
    /// Attempts beyond the first.
    pub retries: u64,
    /// Transfers that were made without the lock service.
    pub degraded: u64,
    /// Attempts that the store refused because it had seen a newer holder, where the work saw it:
    /// a branch that is there from the start is refused before.
    pub stale: u64,
    pub lost_leases: u64,
    /// What `run` gave up with, by kind of error, before another call of it succeeded.
    pub errors: BTreeMap<String, u64>,
    /// Commits whose outcome was not known.
    pub in_doubt: u64,
    /// Transfers that were found to be done already, by a commit in doubt or by a worker that was
    /// killed.
    pub found: u64,
}

/// How long a transfer took.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Timing {
    pub id: i64,
    /// From asking for the locks to holding them in the attempt that succeeded.
    pub wait_us: u64,
    /// From asking to the acknowledged commit.
    pub total_us: u64,
}

/// All reports of a run.
#[derive(Debug, Default)]
pub struct Summary {
    sum: Report,
}

impl Summary {
    pub fn add(&mut self, report: Report) {
        let sum = &mut self.sum;
        sum.finished.extend(report.finished);
        sum.retries += report.retries;
        sum.degraded += report.degraded;
        sum.stale += report.stale;
        sum.lost_leases += report.lost_leases;
        sum.in_doubt += report.in_doubt;
        for (kind, count) in report.errors {
            *sum.errors.entry(kind).or_default() += count;
        }
        sum.found += report.found;
    }

    /// The table that is printed at the end.
    pub fn table<'a>(&'a self, transfers: &'a [Transfer], elapsed: Duration) -> Table<'a> {
        Table { sum: &self.sum, transfers, elapsed }
    }
}

pub struct Table<'a> {
    sum: &'a Report,
    transfers: &'a [Transfer],
    elapsed: Duration,
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sum, transfers, elapsed } = self;
        let rate = transfers.len() as f64 / elapsed.as_secs_f64();
        let times = |of: fn(&Timing) -> u64| Spread::of(sum.finished.iter().map(of).collect());
        writeln!(f, "transfers/s        {rate:.0} ({} in {elapsed:.1?})", transfers.len())?;
        writeln!(f, "wait for locks     {}", times(|timing| timing.wait_us))?;
        writeln!(f, "whole transfer     {}", times(|timing| timing.total_us))?;
        let errors: Vec<_> = sum.errors.iter().map(|(kind, n)| format!("{kind} {n}")).collect();
        writeln!(f, "retries            {} {}", sum.retries, errors.join(", "))?;
        writeln!(f, "ran degraded       {}", sum.degraded)?;
        writeln!(f, "stale rejections   {}", sum.stale)?;
        writeln!(f, "lost leases        {}", sum.lost_leases)?;
        writeln!(f, "in doubt, settled  {}", sum.in_doubt)?;
        writeln!(f, "found done         {}", sum.found)?;
        writeln!(f, "hottest keys       {:<22} {:>9} {:>10}", "", "transfers", "mean wait")?;
        for (key, count, wait) in self.hottest(5) {
            writeln!(f, "                   {key:<22} {count:>9} {wait:>10.1?}")?;
        }
        Ok(())
    }
}

impl Table<'_> {
    /// The keys that most transfers named, with the mean wait of those.
    fn hottest(&self, count: usize) -> Vec<(String, usize, Duration)> {
        let waits: HashMap<i64, u64> =
            self.sum.finished.iter().map(|timing| (timing.id, timing.wait_us)).collect();
        let mut keys: HashMap<String, (usize, u64, u64)> = HashMap::new();
        for transfer in self.transfers {
            for key in transfer.keys() {
                let (named, measured, wait_us) = keys.entry(key).or_default();
                *named += 1;
                if let Some(us) = waits.get(&transfer.id) {
                    (*measured, *wait_us) = (*measured + 1, *wait_us + us);
                }
            }
        }
        let mut keys: Vec<_> = keys.into_iter().collect();
        keys.sort_unstable_by(|(a, (x, ..)), (b, (y, ..))| (y, a).cmp(&(x, b)));
        let mean = |sum: u64, count: u64| Duration::from_micros(sum / count.max(1));
        let shown = keys.into_iter().take(count);
        shown.map(|(key, (named, measured, sum))| (key, named, mean(sum, measured))).collect()
    }
}

/// Median, 99th percentile, and maximum.
struct Spread {
    sorted_us: Vec<u64>,
}

impl Spread {
    fn of(mut us: Vec<u64>) -> Self {
        us.sort_unstable();
        Self { sorted_us: us }
    }

    fn at(&self, percent: usize) -> Duration {
        let last = self.sorted_us.len().saturating_sub(1);
        Duration::from_micros(self.sorted_us.get(last * percent / 100).copied().unwrap_or(0))
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p99, max] = [50, 99, 100].map(|percent| format!("{:.1?}", self.at(percent)));
        write!(f, "p50 {p50:<9} p99 {p99:<9} max {max}")
    }
}
