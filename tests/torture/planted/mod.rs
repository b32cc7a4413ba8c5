//! Planted bugs: for each a scenario with its faults in place, in which the bug must be caught, and
//! which must pass without it.
//!
//! The oracles know what was promised, not what was planted: at most one holder of a key at a time,
//! as many entries as grants, a key that is free when its lease is over, a counter that says what
//! was acknowledged. Faults are placed, never left to chance: a paused process is one that sends
//! nothing until somebody else has been granted its key, a lost reply is a certain one.
//!
//! Every scenario begins with a round without faults, in which the bug must not matter, and ends
//! with one after all is healed. So what is broken altogether is not taken for caught.
#![allow(dead_code, reason = "two programs include this, and each uses a part of it")]

mod bugs;
mod counter;
pub mod edits;
mod holder;
mod locks;
mod memory;
mod service;
mod stores;

use bugs::{Case, Plant};

pub use bugs::{BUGS, Bug};

/// The lock service and the store in which bugs are planted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// A Redis server and a PostgreSQL server.
    RedisPostgres,
    /// The service within this process, and a SQLite file.
    MemorySqlite,
}

impl Backend {
    /// Both words, as reports spell them.
    pub fn name(self) -> &'static str {
        match self {
            Self::RedisPostgres => "redis+postgres",
            Self::MemorySqlite => "memory+sqlite",
        }
    }
}

/// What an oracle says: what it has seen that is right, or what is wrong.
type Verdict = Result<String, String>;

/// How one bug fared on one backend.
#[derive(Clone, Debug)]
pub struct Finding {
    pub bug: &'static str,
    pub backend: &'static str,
    /// The oracle refused the run in which the bug was planted.
    pub caught: bool,
    /// The oracle accepted the very same run without it.
    pub clean: bool,
    /// What it said about both.
    pub evidence: String,
}

/// Plants each bug that there can be on `backend`, one after the other.
pub async fn run_all(backend: Backend) -> Vec<Finding> {
    let mut findings = Vec::new();
    for bug in BUGS {
        findings.extend(run(bug, backend).await);
    }
    findings
}

/// Runs a bug's scenario without the bug, then with it; `None` where there can be no such bug.
pub async fn run(bug: Bug, backend: Backend) -> Option<Finding> {
    let Case::Planted(scenario, plant) = bug.on(backend) else { return None };
    let clean = scenario.run(backend, Plant::Nowhere).await;
    let planted = scenario.run(backend, plant).await;
    let said = |verdict: &Verdict| match verdict {
        Ok(seen) | Err(seen) => seen.clone(),
    };
    Some(Finding {
        bug: bug.name,
        backend: backend.name(),
        caught: planted.is_err(),
        clean: clean.is_ok(),
        evidence: format!("planted: {}; without: {}", said(&planted), said(&clean)),
    })
}

/// The bugs that there cannot be on `backend`, each with the reason.
pub fn meaningless(backend: Backend) -> Vec<(&'static str, &'static str)> {
    let why = |bug: &Bug| match bug.on(backend) {
        Case::Meaningless(why) => Some((bug.name, why)),
        Case::Planted(..) => None,
    };
    BUGS.iter().filter_map(why).collect()
}
