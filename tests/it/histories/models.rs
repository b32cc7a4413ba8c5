//! What a lock may answer: four models, after those of Hazelcast's CP subsystem.
//!
//! | | not re-entrant | re-entrant |
//! |---|---|---|
//! | owner-aware | at most one entry, released by its owner | entries of one owner |
//! | fenced | and each grant's token exceeds all before it | and the same token within |
//!
//! They are one function with two switches, `(state, operation) -> state`, or nothing where no
//! correct lock could have answered so.
//!
//! # What is not known
//! A call that was not answered may take effect at any later time, or never; the checker sees to
//! that. An acquire without an answer is cancelled by its client, so a release of it without an
//! answer begins when the client gives up. The token of such a grant is unknown until somebody sees
//! it.
//!
//! # Leases
//! A lease that runs out is a step of nobody, [`Act::Lapse`], which may take effect at any time
//! from one claim after the acquire was *sent* on, or never: no grant is shorter. A history without
//! faults has none, because its leases are far longer than it lasts: there, an entry that vanishes
//! is an error.

use std::collections::BTreeSet;

/// One call, or one step of the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    Acquire {
        owner: usize,
        entry: usize,
        answer: Acquired,
    },
    Release {
        owner: usize,
        entry: usize,
        answer: Released,
    },
    /// Somebody looked: who held it, how often, with which token.
    Inspect(Option<(usize, usize, u64)>),
    Lapse {
        entry: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acquired {
    /// With this token.
    Granted(u64),
    /// Another owner had it.
    Busy,
    /// The owner had entered as often as it may.
    LimitReached,
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    Done,
    /// There was nothing to release.
    Gone,
    Unknown,
}

/// A lock at one key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct State {
    owner: Option<usize>,
    entries: BTreeSet<usize>,
    /// The token of the holder, once it is known.
    token: Option<u64>,
    /// The highest token that is known to have been given out before.
    last: u64,
}

/// One of the four.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    /// The most entries of one owner: one, where a lock is not re-entrant.
    pub limit: usize,
    pub fenced: bool,
    /// Calls may have been sent twice: then a release that finds nothing may have come second.
    pub copies: bool,
}

impl Act {
    /// Whether it changes nothing whenever it is possible.
    pub fn only_looks(&self) -> bool {
        match self {
            Act::Acquire { answer, .. } => {
                matches!(answer, Acquired::Busy | Acquired::LimitReached)
            }
            Act::Inspect(_) => true,
            Act::Release { .. } | Act::Lapse { .. } => false,
        }
    }
}

impl Model {
    /// The state after `act`, if a correct lock in `state` could have answered so.
    pub fn step(self, state: &State, act: &Act) -> Option<State> {
        match act {
            Act::Acquire { owner, entry, answer } => self.acquire(state, *owner, *entry, *answer),
            Act::Release { owner, entry, answer } => self.release(state, *owner, *entry, *answer),
            Act::Inspect(seen) => self.inspect(state, *seen),
            Act::Lapse { entry } => without(state, *entry),
        }
    }

    fn acquire(self, state: &State, owner: usize, entry: usize, answer: Acquired) -> Option<State> {
        let holds = state.owner == Some(owner);
        let full = holds && state.entries.len() >= self.limit;
        match answer {
            Acquired::Busy => (!holds && state.owner.is_some()).then(|| state.clone()),
            Acquired::LimitReached => full.then(|| state.clone()),
            Acquired::Granted(_) | Acquired::Unknown => {
                if full || (!holds && state.owner.is_some()) {
                    return None;
                }
                let mut next = state.clone();
                next.entries.insert(entry);
                next.owner = Some(owner);
                match answer {
                    Acquired::Granted(token) => self.sees(next, token),
                    _ => Some(next),
                }
            }
        }
    }

    fn release(self, state: &State, owner: usize, entry: usize, answer: Released) -> Option<State> {
        let released = without(state, entry).filter(|_| state.owner == Some(owner));
        match answer {
            Released::Done | Released::Unknown => released,
            Released::Gone if !state.entries.contains(&entry) => Some(state.clone()),
            Released::Gone => released.filter(|_| self.copies),
        }
    }

    fn inspect(self, state: &State, seen: Option<(usize, usize, u64)>) -> Option<State> {
        match seen {
            None => state.owner.is_none().then(|| state.clone()),
            Some((owner, count, token)) => {
                let same = state.owner == Some(owner) && state.entries.len() == count;
                same.then(|| self.sees(state.clone(), token)).flatten()
            }
        }
    }

    /// The holder's token becomes known, or is compared.
    fn sees(self, mut state: State, token: u64) -> Option<State> {
        if !self.fenced {
            return Some(state);
        }
        match state.token {
            Some(known) => (known == token).then_some(state),
            None if token > state.last => {
                (state.token, state.last) = (Some(token), token);
                Some(state)
            }
            None => None,
        }
    }
}

/// The state without an entry that is there.
fn without(state: &State, entry: usize) -> Option<State> {
    let mut next = state.clone();
    if !next.entries.remove(&entry) {
        return None;
    }
    if next.entries.is_empty() {
        (next.owner, next.token) = (None, None);
    }
    Some(next)
}
