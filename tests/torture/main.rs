//! Torture: real processes under real faults, for as long as one likes, and oracles that read what
//! they did.
//!
//! `scripts/torture` builds and starts it. A workload is a row in [`WORKLOADS`]. Each run prints
//! its seed first and one JSON object last; it exits with success only when the run *holds*:
//! nothing happened that must not, and the faults bit often enough for that to mean something.
//!
//! # How a run goes
//! The conductor starts servers, and starts this very program as worker processes, which write
//! down what they do, each into a file of its own ([`history`]). Meanwhile the nemesis stops and
//! kills them and their servers. Then it heals everything, waits, and requires that every last
//! operation succeeds. The oracle reads the histories, and asks the store about every operation
//! whose outcome its worker did not know.
//!
//! # Why workers stop themselves
//! A stop at a random moment hardly ever hits the few instructions between a check and what it
//! protects. So the nemesis asks a worker to stop itself there: it says so, and sends itself
//! SIGSTOP.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    unreachable_pub,
    reason = "a program that tests: it prints, and panics to fail"
)]

mod clock;
mod counter;
mod crew;
mod degraded;
mod exclusion;
mod findings;
mod history;
mod planted;
mod plants;
mod re_entry;
mod renewal;
mod stage;
#[allow(dead_code, unused_imports, reason = "shared with the integration tests")]
#[path = "../it/support/mod.rs"]
mod support;
mod worker;

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::runtime::Builder;

use findings::{Findings, Summary, Verdict};
use stage::{Backend, Stage};

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// What a run may take beyond twice its time.
const PATIENCE: Duration = Duration::from_secs(180);

/// One thing to be shown.
struct Workload {
    name: &'static str,
    shows: &'static str,
    /// Whether there is a control: the same without what is to be shown to matter.
    control: bool,
    run: for<'s> fn(&'s Stage) -> BoxFuture<'s, Result<Findings>>,
}

const WORKLOADS: &[Workload] = &[
    Workload {
        name: "W1",
        shows: "fenced counter: no update is lost, whoever is stopped, killed or overtaken",
        control: true,
        run: |stage| counter::run(stage).boxed(),
    },
    Workload {
        name: "W2",
        shows: "exclusion: no overlap without faults; a loser's next call fails, or it is told",
        control: false,
        run: |stage| exclusion::run(stage).boxed(),
    },
    Workload {
        name: "W9",
        shows: "re-entry: one token, an exact count, whatever order, repetition and losses",
        control: false,
        run: |stage| re_entry::run(stage).boxed(),
    },
    Workload {
        name: "W10",
        shows: "renewal: no healthy lease is lost; whoever cannot renew is told in time",
        control: false,
        run: |stage| renewal::run(stage).boxed(),
    },
    Workload {
        name: "W11",
        shows: "degraded: half the workers lose the lock service and come back; nothing is lost",
        control: true,
        run: |stage| degraded::run(stage).boxed(),
    },
    Workload {
        name: "W13",
        shows: "planted bugs: each is caught, and what catches it accepts the library as it is",
        control: false,
        run: |stage| plants::run(stage).boxed(),
    },
];

/// Real processes under real faults, and oracles that read what they did.
#[derive(Debug, Parser)]
#[command(name = "torture")]
struct Options {
    /// `list`, `all`, or the name of a workload.
    what: String,
    /// How long a run lasts.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(10..=86_400))]
    seconds: u64,
    /// Where locks and data are; `all` runs on both.
    #[arg(long, default_value_t = Backend::Redis)]
    backend: Backend,
    /// Which faults and when; printed if it is not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Only the control: it must fail where the run must hold.
    #[arg(long)]
    control: bool,
    /// What a worker is to do. The program starts those itself.
    #[arg(long, hide = true)]
    settings: Option<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if let Some(settings) = &options.settings {
        return worker::main(settings);
    }
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    match conduct(&options, &runtime) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything that was asked for holds.
fn conduct(options: &Options, runtime: &tokio::runtime::Runtime) -> Result<bool> {
    if options.what == "list" {
        for workload in WORKLOADS {
            let control = if workload.control { "; has a control" } else { "" };
            println!("{:4} {}{control}", workload.name, workload.shows);
        }
        return Ok(true);
    }
    if options.what == "all" {
        let mut verdicts = Vec::new();
        for workload in WORKLOADS {
            for backend in Backend::ALL {
                verdicts.push(perform(workload, backend, options, runtime)?);
            }
        }
        let holding = verdicts.iter().filter(|verdict| **verdict == Verdict::Holds).count();
        let holds = holding == verdicts.len();
        let verdict = verdicts.iter().copied().find(|verdict| *verdict != Verdict::Holds);
        let verdict = verdict.unwrap_or(Verdict::Holds);
        println!(
            "{}",
            serde_json::json!({
                "workload": "all", "runs": verdicts.len(), "hold": holding, "verdict": verdict,
            })
        );
        return Ok(holds);
    }
    let workload = WORKLOADS.iter().find(|workload| workload.name == options.what);
    let workload = workload.ok_or_else(|| format!("{:?}: see `list`", options.what))?;
    if options.control && !workload.control {
        return Err(format!("{} has no control", workload.name).into());
    }
    Ok(perform(workload, options.backend, options, runtime)? == Verdict::Holds)
}

/// One run of one workload, with its line.
fn perform(
    workload: &Workload,
    backend: Backend,
    options: &Options,
    runtime: &tokio::runtime::Runtime,
) -> Result<Verdict> {
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    println!("{} on {backend}, {} s, --seed {seed}", workload.name, options.seconds);
    let time = Duration::from_secs(options.seconds);
    let stage = Stage::new(backend, seed, time, options.control)?.with_redis().with_postgres();
    // A run that panics has said so already; it proves nothing.
    let run = AssertUnwindSafe((workload.run)(&stage)).catch_unwind();
    let run = async { tokio::time::timeout(time * 2 + PATIENCE, run).await };
    let findings = match runtime.block_on(run) {
        Ok(Ok(Ok(findings))) => findings,
        Ok(Ok(Err(error))) => Findings::none(error.to_string()),
        Ok(Err(_)) => Findings::none("the run panicked".to_owned()),
        Err(_) => Findings::none("the run does not end".to_owned()),
    };
    let verdict = findings.verdict();
    for complaint in findings.complaints() {
        println!("{complaint}");
    }
    if verdict != Verdict::Holds {
        println!("everything that was written is in {}", stage.keep().display());
    }
    let Findings { ok, unknown, lost, bites, figures, violations, .. } = findings;
    let summary = Summary {
        workload: workload.name,
        backend: backend.name(),
        seed,
        seconds: options.seconds,
        ok,
        unknown,
        lost,
        bites,
        figures,
        violations: violations.len() as u64,
        verdict,
    };
    println!("{}", serde_json::to_string(&summary)?);
    Ok(verdict)
}
