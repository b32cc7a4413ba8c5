//! Reads the histories and the store of W1, and says what was lost.

use std::collections::{BTreeMap, HashMap};

use super::store::Row;
use super::{Failure, Operation};
use crate::history::Outcome;

/// What one phase came to.
#[derive(Debug, Default)]
pub struct Phase {
    pub ok: u64,
    pub unknown: u64,
    pub lost: u64,
    pub stale: u64,
    pub lost_leases: u64,
    pub violations: Vec<String>,
}

/// Judges what the workers say they did by what is in the store. `last` operations must have been
/// the last of their tasks.
pub fn judge(
    lines: Vec<Operation>,
    rows: &[Row],
    counters: &BTreeMap<String, i64>,
    last: usize,
) -> Phase {
    let mut phase = Phase::default();
    let operations = merge(lines);
    let written: HashMap<&str, &Row> = rows.iter().map(|row| (row.id.as_str(), row)).collect();
    for operation in operations.values() {
        phase.outcome(operation, written.get(operation.id.as_str()).copied());
    }
    for row in rows.iter().filter(|row| !operations.contains_key(&row.id)) {
        phase.violations.push(format!("{row:?} is in the store, and nobody wrote it"));
    }
    for (key, counter) in counters {
        let mut of_key: Vec<&Row> = rows.iter().filter(|row| row.key == *key).collect();
        of_key.sort_by_key(|row| (row.value, row.token));
        phase.counter(key, *counter, &of_key);
        phase.order(&of_key, &operations);
    }
    phase.pairs(operations.values());
    let done = operations.values().filter(|operation| operation.last);
    let done: Vec<_> = done.filter(|operation| operation.outcome == Outcome::Ok).collect();
    if done.len() < last {
        let done = done.len();
        phase.violations.push(format!("healed, only {done} of {last} last operations succeeded"));
    }
    phase
}

/// The last line of each operation counts: the first one says that it has begun.
fn merge(lines: Vec<Operation>) -> BTreeMap<String, Operation> {
    let mut merged: BTreeMap<String, Operation> = BTreeMap::new();
    for line in lines {
        let known = merged.get(&line.id);
        if known.is_none_or(|known| known.ended.is_none()) {
            merged.insert(line.id.clone(), line);
        }
    }
    merged
}

impl Phase {
    /// An outcome against the row that it should have left.
    fn outcome(&mut self, operation: &Operation, row: Option<&Row>) {
        match (operation.outcome, row) {
            (Outcome::Ok, Some(row)) if Some(row.value) == operation.written => self.ok += 1,
            (Outcome::Ok, row) => {
                self.lost += 1;
                self.violations
                    .push(format!("acknowledged and not there ({row:?}): {operation:?}"));
            }
            (Outcome::No, Some(row)) => {
                let what = format!("reported as rolled back, but {row:?}: {operation:?}");
                self.violations.push(what);
            }
            (Outcome::No, None) => {}
            // The store has the answer; the counter takes part in the count either way.
            (Outcome::Unknown, _) => self.unknown += 1,
        }
        if operation.granted.is_none() {
            return;
        }
        match operation.why {
            Some(Failure::Stale) => self.stale += 1,
            Some(Failure::Lost) => self.lost_leases += 1,
            Some(Failure::Other(_)) | None => {}
        }
    }

    /// The counter is the number of writes, and no two have written the same value.
    fn counter(&mut self, key: &str, counter: i64, rows: &[&Row]) {
        for pair in rows.windows(2).filter(|pair| pair[0].value == pair[1].value) {
            self.lost += 1;
            self.violations.push(format!("lost update: {:?} and {:?}", pair[0], pair[1]));
        }
        let top = rows.last().map_or(0, |row| row.value);
        if counter != top {
            self.violations.push(format!("{key} is {counter}, the last write says {top}"));
        }
        let distinct = rows.chunk_by(|a, b| a.value == b.value).count() as i64;
        if distinct != top {
            self.violations.push(format!("{key} reached {top} in {distinct} steps"));
        }
    }

    /// Tokens grow from write to write, and nobody writes before somebody who had ended before.
    fn order(&mut self, rows: &[&Row], operations: &BTreeMap<String, Operation>) {
        let mut latest_start = 0;
        for pair in rows.windows(2) {
            if pair[0].token >= pair[1].token && pair[0].value < pair[1].value {
                self.violations.push(format!("tokens: {:?} before {:?}", pair[0], pair[1]));
            }
        }
        for row in rows {
            let Some(operation) = operations.get(&row.id) else { continue };
            if operation.ended.is_some_and(|ended| ended < latest_start) {
                self.violations.push(format!("out of time: {operation:?}"));
            }
            latest_start = latest_start.max(operation.started);
        }
    }

    /// No two grants of a key have the same token and owner.
    fn pairs<'o>(&mut self, operations: impl Iterator<Item = &'o Operation>) {
        let mut seen = HashMap::new();
        for operation in operations {
            let (Some(token), Some(owner)) = (operation.token, &operation.owner) else { continue };
            let other = seen.insert((&operation.key, token, owner), &operation.id);
            if let Some(other) = other {
                let id = &operation.id;
                self.violations.push(format!("{other} and {id} had one token and one owner"));
            }
        }
    }
}
