//! The fence statement and what it answers.

use sqlx::{AssertSqlSafe, Executor, PgConnection, Row};
use uuid::Uuid;

use crate::error::Error;
use crate::sql::postgres::prepared::{Prepared, Shown};
use crate::sql::postgres::{Published, TOKENS, hex, millis, unhex};
use crate::types::Mode;

use super::super::sql_store::SqlStore;
use super::super::verdict::{Tokens, signed, stale};
use super::super::{Fence, Held};
use super::Postgres;

/// What the fence statement returned.
pub(super) struct Taken {
    /// The keys that passed, each with the write_tx found there.
    pub(super) passed: Vec<(String, Option<Uuid>)>,
    pub(super) id: u64,
    pub(super) read_committed: bool,
}

/// Shows the tokens to the rows of `held`, in one message with the statements `before` it.
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
    before += &Prepared::of(store.fence).fence(&shown);
    let rows = conn.fetch_all(sqlx::raw_sql(AssertSqlSafe(before))).await?;
    let row = rows.last().ok_or(sqlx::Error::RowNotFound)?;
    let keys: Vec<String> = row.try_get(0)?;
    let priors: Vec<Option<Uuid>> = row.try_get(1)?;
    let (id, isolation): (String, String) = (row.try_get(2)?, row.try_get(3)?);
    let id = id.parse().map_err(|_| sqlx::Error::Protocol(format!("no transaction id: {id}")))?;
    let passed = keys.iter().map(|key| unhex(key).unwrap_or_default()).zip(priors).collect();
    Ok(Taken { passed, id, read_committed: isolation == "read committed" })
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

/// Why some keys of `held` did not pass, asked in the same transaction, which has their rows.
pub(super) async fn refusal(
    conn: &mut PgConnection,
    held: &[Held],
    taken: &Taken,
) -> Result<Error, sqlx::Error> {
    let rows = tokens(conn, held).await?;
    Ok(stale(held, &taken.passed, &rows))
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
    let keys = fence.held.iter().map(shown).map(|(key, mode, token)| (hex(key), mode, token));
    Published { attempt: fence.attempt, owner: fence.owner.as_uuid(), keys: keys.collect() }
}
