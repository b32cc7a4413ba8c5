//! What the fence rows say. Decides; does no I/O.

use uuid::Uuid;

use crate::error::{Error, ErrorKind};
use crate::types::{FencingToken, Mode, ResourceKey, Want};

use super::{Fence, Held};

/// What a branch found at the key of an exclusively held row when it took it.
#[derive(Clone, Debug)]
pub(super) struct Prior {
    pub(super) key: ResourceKey,
    pub(super) token: FencingToken,
    /// Who wrote before.
    pub(super) tx: Option<Uuid>,
}

/// The keys that a branch has fenced.
#[derive(Clone, Debug, Default)]
pub struct Fenced {
    keys: Vec<Want>,
    priors: Vec<Prior>,
}

impl Fenced {
    /// Those of `held` that are not fenced yet.
    pub(super) fn missing(&self, held: &[Held]) -> Vec<Held> {
        let fenced = |held: &&Held| {
            self.keys.iter().any(|want| want.key == held.key && want.mode >= held.mode)
        };
        held.iter().filter(|held| !fenced(held)).cloned().collect()
    }

    /// Notes keys that passed, each with the `write_tx` found there; under the token that the store
    /// issued, if it did.
    pub(super) fn add(
        &mut self,
        held: &[Held],
        passed: &[(String, Option<Uuid>)],
        issued: Option<FencingToken>,
    ) {
        for held in held {
            self.keys.push(Want::new(held.key.clone(), held.mode));
            let found = passed.iter().find(|(key, _)| key == held.key.as_str());
            if let (Mode::Exclusive, Some((_, tx))) = (held.mode, found) {
                let token = issued.unwrap_or(held.token);
                self.priors.push(Prior { key: held.key.clone(), token, tx: *tx });
            }
        }
    }

    pub(super) fn priors(&self) -> &[Prior] {
        &self.priors
    }
}

/// A fence row as a plain read shows it, with the watermark beside it.
#[derive(Clone, Debug)]
pub(super) struct Tokens {
    pub(super) resource: String,
    /// `None` where there is no row.
    pub(super) write_token: Option<i64>,
    pub(super) write_owner: Option<Uuid>,
    pub(super) read_token: Option<i64>,
    pub(super) mark: i64,
}

/// A fence row as it was seen under its lock.
#[derive(Clone, Debug)]
pub(super) struct Looked {
    pub(super) resource: String,
    /// Negative where there was no row.
    pub(super) write_token: i64,
    pub(super) write_tx: Option<Uuid>,
    pub(super) mark: i64,
}

/// What became of a commit whose reply was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Settled {
    Committed,
    RolledBack,
    /// The rows do not tell any more, and why.
    Unknown(&'static str),
}

/// Some keys did not pass: the caller's tokens are stale.
///
/// The floor is the highest token among all the rows, so that one new attempt passes them all.
pub(super) fn stale(held: &[Held], passed: &[(String, Option<Uuid>)], rows: &[Tokens]) -> Error {
    let refused = held.iter().find(|held| !passed.iter().any(|(key, _)| key == held.key.as_str()));
    let detail = "the store has seen a newer holder of this key, so this one's time is over";
    let error = Error::new(ErrorKind::StaleToken, "fence", detail);
    let error = match refused {
        Some(held) => error.with_key(held.key.clone()),
        None => error,
    };
    match floor(rows) {
        Some(floor) => error.with_floor(floor),
        None => error,
    }
}

/// The store has no token left to issue: what its rows hold was never one of ours.
pub(super) fn exhausted() -> Error {
    let detail = "the store has seen a token that leaves none above it; tokens stay below 2^53";
    Error::new(ErrorKind::Corrupt, "fence", detail)
}

/// Whether a snapshot holds something newer than the tokens of who reads it.
pub(super) fn overtaken(fence: &Fence, rows: &[Tokens]) -> Option<Error> {
    let passed: Vec<_> = rows
        .iter()
        .filter(|row| {
            let held = fence.held.iter().find(|held| held.key.as_str() == row.resource);
            held.is_some_and(|held| reads_current(fence, held, row))
        })
        .map(|row| (row.resource.clone(), None))
        .collect();
    (passed.len() < fence.held.len()).then(|| stale(&fence.held, &passed, rows))
}

fn reads_current(fence: &Fence, held: &Held, row: &Tokens) -> bool {
    let token = signed(held.token);
    let mine = row.write_owner == Some(fence.owner.as_uuid());
    token > row.mark && row.write_token.is_some_and(|seen| token > seen || (token == seen && mine))
}

/// What the rows of a branch, seen under their locks, say about its commit.
///
/// One key is proof for all, because they were written by one commit.
pub(super) fn settle(attempt: Uuid, priors: &[Prior], rows: &[Looked]) -> Settled {
    let mut unknown = "the store has no row of this transaction's keys";
    let mut rolled_back = false;
    for prior in priors {
        let Some(row) = rows.iter().find(|row| row.resource == prior.key.as_str()) else {
            continue;
        };
        if row.write_tx == Some(attempt) {
            return Settled::Committed;
        }
        if signed(prior.token) <= row.mark {
            unknown = "the rows may have been purged meanwhile";
        } else if row.write_tx == prior.tx || row.write_token < signed(prior.token) {
            rolled_back = true;
        } else {
            unknown = "a later transaction has written under the same keys";
        }
    }
    if rolled_back { Settled::RolledBack } else { Settled::Unknown(unknown) }
}

/// Tokens stay below 2^53, so they fit.
pub(super) fn signed(token: FencingToken) -> i64 {
    i64::try_from(token.get()).unwrap_or(i64::MAX)
}

/// The token that a store keeps as this number.
pub(super) fn token_of(number: i64) -> Option<FencingToken> {
    FencingToken::new(u64::try_from(number).ok()?)
}

fn floor(rows: &[Tokens]) -> Option<FencingToken> {
    rows.iter()
        .flat_map(|row| [row.write_token, row.read_token, Some(row.mark)])
        .flatten()
        .filter_map(token_of)
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINE: Uuid = Uuid::from_u128(1);
    const BEFORE: Uuid = Uuid::from_u128(2);
    const LATER: Uuid = Uuid::from_u128(3);

    fn prior(tx: Option<Uuid>) -> Vec<Prior> {
        let key = ResourceKey::parse("k").unwrap();
        vec![Prior { key, token: FencingToken::new(10).unwrap(), tx }]
    }

    fn row(write_token: i64, write_tx: Option<Uuid>, mark: i64) -> Vec<Looked> {
        vec![Looked { resource: "k".into(), write_token, write_tx, mark }]
    }

    #[test]
    fn a_row_that_names_the_attempt_is_a_commit_whatever_came_after() {
        assert_eq!(settle(MINE, &prior(None), &row(10, Some(MINE), 0)), Settled::Committed);
        // A later holder that only read raised the token and left write_tx.
        assert_eq!(settle(MINE, &prior(None), &row(12, Some(MINE), 11)), Settled::Committed);
    }

    #[test]
    fn a_row_as_it_was_before_is_a_rollback() {
        let rolled_back = Settled::RolledBack;
        assert_eq!(settle(MINE, &prior(Some(BEFORE)), &row(10, Some(BEFORE), 0)), rolled_back);
        assert_eq!(settle(MINE, &prior(Some(BEFORE)), &row(9, Some(LATER), 0)), rolled_back);
        assert_eq!(settle(MINE, &prior(None), &row(-1, None, 9)), rolled_back);
    }

    #[test]
    fn an_overwritten_or_purged_row_tells_nothing() {
        let unknown = |settled| matches!(settled, Settled::Unknown(_));
        assert!(unknown(settle(MINE, &prior(Some(BEFORE)), &row(11, Some(LATER), 0))));
        assert!(unknown(settle(MINE, &prior(None), &row(-1, None, 10))));
        assert!(unknown(settle(MINE, &prior(None), &[])));
    }
}
