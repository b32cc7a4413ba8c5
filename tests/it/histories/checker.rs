//! Whether a history of one lock can be put in an order in which a correct lock would have answered
//! the same.
//!
//! The search of Wing and Gong in the form of Lowe ("Testing for linearizability", 2017): the
//! events are read in order, and an operation is put in place *just in time*, when one returns that
//! must have taken effect. What is kept is a set of configurations: the state of the lock, and
//! which of the operations under way have taken effect in it.
//!
//! # Why unknown operations are cheap
//! An operation without an answer stays under way for ever. Of two configurations that differ only
//! in which unknown operations were used up, the one that used fewer can do all that the other one
//! can; the other one is dropped. Operations that only look are put in place as soon as they can
//! be: that costs nothing, and they need not be thought of again.

use std::collections::{BTreeSet, HashMap};
use std::fmt;

use super::models::{Act, Model, State};

/// An operation, when it was asked for, and when it was answered. `None`: it never was.
#[derive(Clone, Debug)]
pub struct Operation {
    pub act: Act,
    pub invoked: u128,
    pub returned: Option<u128>,
}

/// What cannot have happened.
#[derive(Debug)]
pub struct Violation {
    /// The first operation whose answer has no explanation.
    pub operation: Box<Operation>,
    /// What the lock may have looked like before.
    pub instead: Vec<State>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "no order explains {:?}, where the lock was", self.operation)?;
        self.instead.iter().try_for_each(|state| writeln!(f, "  {state:?}"))
    }
}

/// One way in which everything so far may have happened.
#[derive(Clone, Debug)]
struct Configuration {
    state: State,
    /// Operations under way, to be answered, that have taken effect.
    done: BTreeSet<usize>,
    /// Operations without an answer that have taken effect.
    used: BTreeSet<usize>,
}

/// Configurations of which none can do all that another one can.
#[derive(Default)]
struct Distinct(HashMap<(State, BTreeSet<usize>), Vec<BTreeSet<usize>>>);

impl Distinct {
    /// Adds a configuration, unless it is no better than what is there.
    fn add(&mut self, new: &Configuration) -> bool {
        let known = self.0.entry((new.state.clone(), new.done.clone())).or_default();
        if known.iter().any(|used| used.is_subset(&new.used)) {
            return false;
        }
        known.retain(|used| !new.used.is_subset(used));
        known.push(new.used.clone());
        true
    }

    fn into_configurations(self) -> Vec<Configuration> {
        let all = self.0.into_iter().flat_map(|((state, done), used)| {
            let of = move |used| Configuration { state: state.clone(), done: done.clone(), used };
            used.into_iter().map(of)
        });
        all.collect()
    }
}

struct Search<'a> {
    model: Model,
    operations: &'a [Operation],
    under_way: BTreeSet<usize>,
    configurations: Vec<Configuration>,
}

/// Checks the history of one lock that was free in the beginning.
///
/// # Errors
/// The first answer that no order explains.
pub fn check(model: Model, operations: &[Operation]) -> Result<(), Violation> {
    // At the same time, what is asked for comes before what is answered: they overlap.
    let mut events: Vec<(u128, bool, usize)> = Vec::new();
    for (index, operation) in operations.iter().enumerate() {
        events.push((operation.invoked, false, index));
        events.extend(operation.returned.map(|at| (at, true, index)));
    }
    events.sort_unstable();
    let begin =
        Configuration { state: State::default(), done: BTreeSet::new(), used: BTreeSet::new() };
    let mut search =
        Search { model, operations, under_way: BTreeSet::new(), configurations: vec![begin] };
    for (_, returns, index) in events {
        if returns {
            search.answered(index)?;
        } else {
            search.asked(index);
        }
    }
    Ok(())
}

impl Search<'_> {
    fn asked(&mut self, index: usize) {
        self.under_way.insert(index);
        let mut all = std::mem::take(&mut self.configurations);
        all.iter_mut().for_each(|configuration| self.look(configuration));
        self.configurations = all;
    }

    /// Puts in place what only looks.
    fn look(&self, configuration: &mut Configuration) {
        for index in &self.under_way {
            let act = &self.operations[*index].act;
            if act.only_looks()
                && !configuration.done.contains(index)
                // A look that learns a token binds what follows, and so is a step like others.
                && self.model.step(&configuration.state, act).as_ref() == Some(&configuration.state)
            {
                configuration.done.insert(*index);
            }
        }
    }

    /// The operation has taken effect by now: keeps what can explain it.
    fn answered(&mut self, index: usize) -> Result<(), Violation> {
        let before = std::mem::take(&mut self.configurations);
        let (mut seen, mut after) = (Distinct::default(), Distinct::default());
        let mut open: Vec<_> = before.iter().filter(|one| seen.add(one)).cloned().collect();
        while let Some(mut configuration) = open.pop() {
            if configuration.done.remove(&index) {
                after.add(&configuration);
                continue;
            }
            let next = self.under_way.iter().filter_map(|step| self.step(&configuration, *step));
            open.extend(next.filter(|next| seen.add(next)));
        }
        self.under_way.remove(&index);
        self.configurations = after.into_configurations();
        if self.configurations.is_empty() {
            let operation = Box::new(self.operations[index].clone());
            let instead = before.into_iter().map(|configuration| configuration.state).collect();
            return Err(Violation { operation, instead });
        }
        Ok(())
    }

    fn step(&self, from: &Configuration, index: usize) -> Option<Configuration> {
        if from.done.contains(&index) || from.used.contains(&index) {
            return None;
        }
        let operation = &self.operations[index];
        let mut next = from.clone();
        next.state = self.model.step(&from.state, &operation.act)?;
        match operation.returned {
            Some(_) => next.done.insert(index),
            None => next.used.insert(index),
        };
        self.look(&mut next);
        Some(next)
    }
}
