//! What a run has found, and the one line that says it.

use std::collections::BTreeMap;

use serde::Serialize;

/// What a workload reports.
#[derive(Debug, Default)]
pub struct Findings {
    pub ok: u64,
    /// Operations whose outcome nobody knew; the oracle has asked the store.
    pub unknown: u64,
    /// Updates that were acknowledged, or written, and are not there.
    pub lost: u64,
    /// How often a fault has met what the run is about.
    pub bites: u64,
    /// Further figures of this workload, by name.
    pub figures: BTreeMap<&'static str, u64>,
    /// What must not have happened, in words.
    pub violations: Vec<String>,
    needs: Vec<Need>,
    /// Why the run could not be made.
    failure: Option<String>,
}

/// Something that a run must have provoked, or it proves nothing.
#[derive(Debug)]
struct Need {
    what: &'static str,
    seen: u64,
    least: u64,
}

/// What came of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Holds,
    Violated,
    /// The faults did not bite enough, or the run could not be made.
    Void,
}

/// The last line of a run.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub workload: &'static str,
    pub backend: &'static str,
    pub seed: u64,
    pub seconds: u64,
    pub ok: u64,
    pub unknown: u64,
    pub lost: u64,
    pub bites: u64,
    #[serde(flatten)]
    pub figures: BTreeMap<&'static str, u64>,
    pub violations: u64,
    pub verdict: Verdict,
}

impl Findings {
    /// Those of a run that could not be made.
    pub fn none(failure: String) -> Self {
        Self { failure: Some(failure), ..Self::default() }
    }

    pub fn violation(&mut self, what: impl Into<String>) {
        self.violations.push(what.into());
    }

    /// Notes a figure that must be at least `least` for the run to prove anything.
    pub fn need(&mut self, what: &'static str, seen: u64, least: u64) {
        self.needs.push(Need { what, seen, least });
    }

    pub fn verdict(&self) -> Verdict {
        if self.lost > 0 || !self.violations.is_empty() {
            Verdict::Violated
        } else if self.failure.is_some() || self.needs.iter().any(|need| need.seen < need.least) {
            Verdict::Void
        } else {
            Verdict::Holds
        }
    }

    /// What is wrong, a line each; nothing where the run holds.
    pub fn complaints(&self) -> Vec<String> {
        let short = self.needs.iter().filter(|need| need.seen < need.least);
        let short = short.map(|Need { what, seen, least }| {
            format!("void: {what} is {seen}, and must be at least {least}")
        });
        let failure = self.failure.iter().map(|why| format!("void: {why}"));
        let violations = self.violations.iter().map(|what| format!("violation: {what}"));
        violations.chain(failure).chain(short).collect()
    }
}
