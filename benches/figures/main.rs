//! What palisade costs, against the least that could do the same.
//!
//! Every ratio is the median of pairs: ours and the baseline take turns within one run, so that a
//! machine that is slow for a while is slow for both. `scripts/bench` runs it; the table goes to
//! the terminal and `target/bench/summary.jsonl`. Goals are reported: a missed one fails nothing.

mod bare;
mod cycle;
mod handover;
mod heap;
mod leases;
mod machine;
mod outage;
mod pairs;
mod report;
#[allow(dead_code, unused_imports, reason = "made for the tests, which use all of it")]
#[path = "../../tests/it/support/mod.rs"]
mod support;
mod transfer;
mod window;

use std::time::Duration;

use clap::Parser;
use palisade::{LockOptions, Locks};
use tokio::runtime::{Builder, Runtime};

use machine::Watch;
use report::Report;
use support::RedisServer;

/// A group of figures that are measured together.
type Group = (&'static [&'static str], fn(&mut Bench));

const GROUPS: &[Group] = &[
    (&["cycle_ratio", "cycle_cpu_us"], cycle::run),
    (&["handover_ratio", "handover_fairness", "handover_commands"], handover::run),
    (&["local_handover_ratio"], handover::run_local),
    (&["idle_commands"], leases::run_idle),
    (&["renew_commands_per_s", "renew_lost", "renew_cpu_us", "lease_bytes"], leases::run_renewal),
    (&["breaker_call_ns"], outage::run_bookkeeping),
    (&["fail_fast_us", "back_after_ms"], outage::run),
    (&["pg_transfer_ratio", "pg_plain_ratio"], transfer::run),
];

/// Measures what palisade costs and prints a table.
#[derive(Parser)]
struct Options {
    /// Short windows and fewer points: 90 seconds in all.
    #[arg(long)]
    quick: bool,
    /// Only the figures whose names contain this.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Passed by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What the groups share.
struct Bench {
    quick: bool,
    report: Report,
}

impl Bench {
    /// How long one side runs before the other takes its turn.
    fn window(&self, quick_ms: u64, full_ms: u64) -> Duration {
        Duration::from_millis(if self.quick { quick_ms } else { full_ms })
    }
}

fn main() {
    let Options { quick, only, bench: _ } = Options::parse();
    let only = only.unwrap_or_default();
    let wanted = |(names, _): &&Group| names.iter().any(|name| name.contains(&only));
    let groups: Vec<_> = GROUPS.iter().filter(wanted).collect();
    if groups.is_empty() {
        eprintln!("no figure is named like {only:?}; there are:");
        GROUPS.iter().for_each(|(names, _)| eprintln!("  {}", names.join(", ")));
        std::process::exit(2);
    }
    let watch = Watch::start();
    let mut bench = Bench { quick, report: Report::open() };
    machine::print(quick);
    for (_, run) in groups {
        run(&mut bench);
    }
    bench.report.close(&watch);
}

/// What most programs run on; two workers, as on the machine of the published figures.
fn multi_thread() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

fn current_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Locks whose waiters all stand in line at the service.
async fn locks_without_hand_over(server: &RedisServer) -> Locks {
    let mut options = LockOptions::default();
    options.hand_over.enabled = false;
    palisade::connect_with(&server.url(), options).await.expect("a lock service")
}
