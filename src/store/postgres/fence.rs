//! The fence statement and what it answers.

use sqlx::PgConnection;
use uuid::Uuid;

use crate::error::Error;
use crate::sql::postgres::{Published, TOKENS, hex, millis};
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

type Row = (Vec<String>, Vec<Option<Uuid>>, String, String);

/// Shows the tokens to the rows of `held`.
pub(super) async fn take(
    conn: &mut PgConnection,
    store: &SqlStore<Postgres>,
    fence: &Fence,
    held: &[Held],
    attempt: Option<Uuid>,
) -> Result<Taken, sqlx::Error> {
    let (keys, exclusive, tokens) = columns(held, |key| key.to_owned());
    let (keys, priors, id, isolation): Row = sqlx::query_as(store.fence)
        .bind(keys)
        .bind(exclusive)
        .bind(tokens)
        .bind(fence.owner.as_uuid())
        .bind(attempt)
        .bind(millis(fence.lease.get()))
        .bind(millis(store.limit()))
        .fetch_one(conn)
        .await?;
    let id = id.parse().map_err(|_| sqlx::Error::Protocol(format!("no transaction id: {id}")))?;
    let passed = keys.into_iter().zip(priors).collect();
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
    let keys = held.iter().map(|held| text(held.key.as_str())).collect();
    let exclusive = held.iter().map(|held| held.mode == Mode::Exclusive).collect();
    let tokens = held.iter().map(|held| signed(held.token)).collect();
    (keys, exclusive, tokens)
}

/// What others may know of the branch.
pub(super) fn published(fence: &Fence) -> Published {
    let key =
        |held: &Held| (hex(held.key.as_str()), held.mode == Mode::Exclusive, signed(held.token));
    Published {
        attempt: fence.attempt,
        owner: fence.owner.as_uuid(),
        keys: fence.held.iter().map(key).collect(),
    }
}
