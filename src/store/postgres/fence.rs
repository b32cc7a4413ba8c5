//! The fence statement and what it answers.

use sqlx::{AssertSqlSafe, Executor, PgConnection, Row};
use uuid::Uuid;

use crate::error::Error;
use crate::sql::postgres::prepared::{Prepared, Shown};
use crate::sql::postgres::{Published, TOKENS, hex, millis, unhex};
use crate::types::{FencingToken, Mode};

use super::super::sql_store::SqlStore;
use super::super::verdict::{Tokens, exhausted, signed, stale, token_of};
use super::super::{Fence, Held, Issuer};
use super::Postgres;

/// What the fence statement returned.
pub(super) struct Taken {
    /// The keys that passed, each with the write_tx found there.
    pub(super) passed: Vec<(String, Option<Uuid>)>,
    pub(super) id: u64,
    pub(super) read_committed: bool,
    /// The token, where the store issues it and has one left.
    pub(super) issued: Option<FencingToken>,
}

/// Takes the rows of `held`, in one message with the statements `before` it: shows the tokens to
/// them, or has the store issue one. Without an attempt for a branch that only reads.
pub(super) async fn take(
    conn: &mut PgConnection,
    store: &SqlStore<Postgres>,
    fence: &Fence,
    held: &[Held],
    attempt: Option<Uuid>,
    mut before: String,
) -> Result<Taken, sqlx::Error> {
    let shown = Shown {
        held: held.iter().map(shown).collect(),
        owner: fence.owner.as_uuid(),
        attempt,
        limits: [millis(fence.lease.get()), millis(store.limit())],
    };
    before += &Prepared::of(store.statement(fence)).fence(&shown);
    let rows = conn.fetch_all(sqlx::raw_sql(AssertSqlSafe(before))).await?;
    let row = rows.last().ok_or(sqlx::Error::RowNotFound)?;
    let keys: Vec<String> = row.try_get(0)?;
    let priors: Vec<Option<Uuid>> = row.try_get(1)?;
    let (id, isolation): (String, String) = (row.try_get(2)?, row.try_get(3)?);
    let issued = match fence.issuer {
        Issuer::LockService => None,
        Issuer::Store => token_of(row.try_get(4)?),
    };
    let id = id.parse().map_err(|_| sqlx::Error::Protocol(format!("no transaction id: {id}")))?;
    let passed = keys.iter().map(|key| unhex(key).unwrap_or_default()).zip(priors).collect();
    Ok(Taken { passed, id, read_committed: isolation == "read committed", issued })
}

/// What the rows of `held` hold.
pub(super) async fn tokens(
    conn: &mut PgConnection,
    held: &[Held],
) -> Result<Vec<Tokens>, sqlx::Error> {
    type Read = (String, Option<i64>, Option<Uuid>, Option<i64>, i64);
    let (keys, _, _) = columns(held, |key| key.to_owned());
    let rows: Vec<Read> = sqlx::query_as(TOKENS).bind(keys).fetch_all(conn).await?;
    let row = |(resource, write_token, write_owner, read_token, mark)| Tokens {
        resource,
        write_token,
        write_owner,
        read_token,
        mark,
    };
    Ok(rows.into_iter().map(row).collect())
}

/// Why some keys of `held` did not pass, asked in the same transaction, which has their rows;
/// `None` when another try may take them.
pub(super) async fn refusal(
    conn: &mut PgConnection,
    fence: &Fence,
    held: &[Held],
    taken: &Taken,
) -> Result<Option<Error>, sqlx::Error> {
    if fence.issuer == Issuer::Store {
        return Ok(taken.issued.is_none().then(exhausted));
    }
    let rows = tokens(conn, held).await?;
    Ok(Some(stale(held, &taken.passed, &rows)))
}

/// Keys, modes and tokens as the arrays that statements take.
pub(super) fn columns(
    held: &[Held],
    text: impl Fn(&str) -> String,
) -> (Vec<String>, Vec<bool>, Vec<i64>) {
    let (mut keys, mut exclusive, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
    for (key, mode, token) in held.iter().map(shown) {
        keys.push(text(key));
        exclusive.push(mode);
        tokens.push(token);
    }
    (keys, exclusive, tokens)
}

/// A key, whether it is held exclusively, and its token.
fn shown(held: &Held) -> (&str, bool, i64) {
    (held.key.as_str(), held.mode == Mode::Exclusive, signed(held.token))
}

/// What others may know of the branch.
pub(super) fn published(fence: &Fence) -> Published {
    let (keys, exclusive, tokens) = announced(fence, &fence.held);
    let keys = keys.into_iter().zip(exclusive).zip(tokens);
    Published {
        attempt: fence.attempt,
        owner: fence.owner.as_uuid(),
        keys: keys.map(|((key, exclusive), token)| (key, exclusive, token)).collect(),
    }
}

/// Keys in hex, modes and tokens, as a branch shows them to whoever meets it.
///
/// Whose token the store issues does not know who else holds the keys, so its time is over when it
/// ends and not before: it shows a token that no other is above. And it keeps the rows of all its
/// keys, so it is in the way of every mode.
pub(super) fn announced(fence: &Fence, held: &[Held]) -> (Vec<String>, Vec<bool>, Vec<i64>) {
    let (keys, exclusive, tokens) = columns(held, hex);
    match fence.issuer {
        Issuer::LockService => (keys, exclusive, tokens),
        Issuer::Store => (keys, vec![true; held.len()], vec![i64::MAX; held.len()]),
    }
}
