//! Taking the write lock and the fence rows, and giving a connection back.

use std::time::Duration;

use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Executor, Row, Sqlite, SqliteConnection};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::sql::sqlite::{TOKENS, json};
use crate::sql::{classify, kind_of};
use crate::types::{FencingToken, Mode};

use super::super::session::Session;
use super::super::sql_store::SqlStore;
use super::super::verdict::{Tokens, exhausted, stale, token_of};
use super::super::{Fence, Held, Issuer};
use super::Loan;

/// What the fence statement returned.
pub(super) struct Taken {
    /// The keys that passed, each with the write_tx found there.
    pub(super) passed: Vec<(String, Option<Uuid>)>,
    /// The token, where the store issues it.
    pub(super) issued: Option<FencingToken>,
}

/// Sends statements of ours that take no parameters. The text is ours, or numbers and ids.
pub(super) async fn run(
    conn: &mut SqliteConnection,
    sql: impl Into<String>,
) -> Result<(), sqlx::Error> {
    conn.execute(sqlx::raw_sql(AssertSqlSafe(sql.into()))).await.map(drop)
}

/// A connection with the write lock. With a fence, in line with the branches of this process.
pub(super) async fn begin(
    store: &SqlStore<Sqlite>,
    operation: &'static str,
    fence: Option<&Fence>,
    deadline: Instant,
) -> Result<Session<Sqlite>> {
    let pass = match fence {
        Some(fence) => Some(store.shared.enter(fence).await?),
        None => None,
    };
    let conn = store.acquire(operation, deadline).await?;
    let mut session = Session::new(conn, Loan { busy_ms: None, pass });
    let conn = session.conn()?;
    let busy_ms = sqlx::query_scalar("PRAGMA busy_timeout").fetch_one(&mut *conn).await;
    session.loan.busy_ms = Some(busy_ms.map_err(|error| classify(operation, error))?);
    let conn = session.conn()?;
    while let Err(error) = run(conn, "PRAGMA busy_timeout = 0; BEGIN IMMEDIATE").await {
        pause(error, deadline).await.map_err(|error| match kind_of(&error) {
            ErrorKind::Conflict => blocked().with_source(error),
            _ => classify(operation, error),
        })?;
    }
    Ok(session)
}

/// Waits a little if the database was busy and the deadline allows it; else the error stands.
pub(super) async fn pause(error: sqlx::Error, deadline: Instant) -> Result<(), sqlx::Error> {
    if kind_of(&error) != ErrorKind::Conflict || Instant::now() >= deadline {
        return Err(error);
    }
    sleep(Duration::from_micros(fastrand::u64(500..5_000))).await;
    Ok(())
}

pub(super) fn blocked() -> Error {
    let detail = "the database was locked by another branch or process until the deadline";
    Error::new(ErrorKind::Conflict, "fence", detail)
}

/// The savepoint that only the fenced transaction has.
pub(super) fn probe(fence: &Fence) -> String {
    format!("palisade_tx_{}", fence.attempt.simple())
}

/// Takes the rows of `held`, all of them or with an error: shows the tokens to them, or has the
/// store issue one.
pub(super) async fn pass(
    conn: &mut SqliteConnection,
    store: &SqlStore<Sqlite>,
    fence: &Fence,
    held: &[Held],
    attempt: Option<Uuid>,
) -> Result<Taken> {
    let rows = sqlx::query(store.statement(fence))
        .bind(array(held))
        .bind(fence.owner.as_uuid())
        .bind(attempt)
        .fetch_all(&mut *conn)
        .await;
    let taken = rows.and_then(|rows| taken(fence, &rows));
    let taken = taken.map_err(|error| classify("fence", error))?;
    if taken.passed.len() == held.len() {
        return Ok(taken);
    }
    if fence.issuer == Issuer::Store {
        return Err(exhausted());
    }
    let rows = tokens(conn, held).await.map_err(|error| classify("fence", error))?;
    Err(stale(held, &taken.passed, &rows))
}

fn taken(fence: &Fence, rows: &[SqliteRow]) -> Result<Taken, sqlx::Error> {
    let passed = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
    let issued = match (fence.issuer, rows.first()) {
        (Issuer::Store, Some(row)) => token_of(row.try_get(2)?),
        _ => None,
    };
    Ok(Taken { passed: passed.collect::<Result<_, sqlx::Error>>()?, issued })
}

fn array(held: &[Held]) -> String {
    json(
        held.iter().map(|held| (held.key.as_str(), held.mode == Mode::Exclusive, held.token.get())),
    )
}

pub(super) async fn tokens(
    conn: &mut SqliteConnection,
    held: &[Held],
) -> Result<Vec<Tokens>, sqlx::Error> {
    type Read = (String, Option<i64>, Option<Uuid>, Option<i64>, i64);
    let rows: Vec<Read> = sqlx::query_as(TOKENS).bind(array(held)).fetch_all(conn).await?;
    let row = |(resource, write_token, write_owner, read_token, mark)| Tokens {
        resource,
        write_token,
        write_owner,
        read_token,
        mark,
    };
    Ok(rows.into_iter().map(row).collect())
}

/// Ends a transaction whose fence refused it.
pub(super) async fn end_refused(mut session: Session<Sqlite>, error: Error) -> Error {
    let ended = match session.conn() {
        Ok(conn) => run(conn, "ROLLBACK").await.is_ok(),
        Err(_) => false,
    };
    if ended {
        give_back(session).await;
    }
    error
}

/// Puts the settings back, and the connection into its pool.
pub(super) async fn give_back(mut session: Session<Sqlite>) {
    let restored = match session.parts() {
        Ok((conn, loan)) => restore(conn, loan).await,
        Err(_) => return,
    };
    if restored.is_ok() {
        session.release();
    }
}

pub(super) async fn restore(conn: &mut SqliteConnection, loan: &Loan) -> Result<(), sqlx::Error> {
    match loan.busy_ms {
        Some(ms) => run(conn, format!("PRAGMA query_only = 0; PRAGMA busy_timeout = {ms}")).await,
        None => Ok(()),
    }
}
