//! Ending a branch: prove that it is still the fenced transaction, end it, and find out what became
//! of it when the answer is lost.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Executor, PgConnection, Postgres, Row};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::sql::postgres::prepared::{LACKING, Prepared};
use crate::sql::postgres::{LOOK, NOT_PROVEN, prove_read};
use crate::sql::{classify, lost_reply, refuse, sqlstate};

use super::super::Outcome;
use super::super::core::doubt;
use super::super::database::Ending;
use super::super::session::Session;
use super::super::verdict::{Looked, Settled, settle};
use super::contact::end_session;
use super::run;

/// How long a rollback may wait for a statement that was cancelled and still runs at the server.
const ROLLBACK_PATIENCE: Duration = Duration::from_secs(1);

const OTHER: &str = "the transaction that was fenced has ended already: a COMMIT or ROLLBACK was \
                     sent through the branch";

type End<'b> = Ending<'b, Postgres>;

/// Commits in one round trip.
pub(super) async fn commit(mut session: Session<Postgres>, ending: End<'_>) -> Outcome {
    let message = prove(&ending) + "COMMIT";
    let answer = match session.conn() {
        Ok(conn) => timeout(ending.store.limit(), run(conn, message)).await,
        Err(error) => return Outcome::RolledBack(error),
    };
    match answer {
        Ok(Ok(())) => {
            session.release();
            Outcome::Committed
        }
        // A session is ended for being idle before it takes up what it is sent, so this COMMIT was
        // not.
        Ok(Err(error)) if sqlstate(&error) == "25P03" => {
            Outcome::RolledBack(classify("commit", error).with_transaction(ending.fence.attempt))
        }
        Ok(Err(error)) if !lost_reply(&error) => refused(session, &ending, error).await,
        Ok(Err(error)) => lost(session, &ending, error).await,
        Err(_) => lost(session, &ending, sqlx::Error::PoolTimedOut).await,
    }
}

/// The server answered with an error: not committed, if this was the fenced transaction.
async fn refused(mut session: Session<Postgres>, ending: &End<'_>, error: sqlx::Error) -> Outcome {
    if is_other(&error) {
        return Outcome::InDoubt(doubt(ending.fence, OTHER).with_source(error));
    }
    let lacking = sqlstate(&error) == LACKING;
    let why = if lacking { unprepared(error) } else { classify("commit", error) };
    let why = why.with_transaction(ending.fence.attempt);
    let ended = match session.conn() {
        Ok(conn) => roll_back(conn, ending, "").await,
        Err(error) => Err(refuse(error)),
    };
    match ended {
        // The session has lost the statements that a branch needs, or a part of them. With a new
        // one that does not happen again.
        Ok(true) if lacking => Outcome::RolledBack(why),
        Ok(true) => {
            session.release();
            Outcome::RolledBack(why)
        }
        Ok(false) => Outcome::InDoubt(doubt(ending.fence, OTHER).with_source(why)),
        // The error was the answer to this commit; only the connection is lost.
        Err(_) => Outcome::RolledBack(why),
    }
}

/// The session has lost the proof since it was fenced. Another session has it.
fn unprepared(error: sqlx::Error) -> Error {
    let detail = "the session has lost the prepared statements of palisade, for example by \
                  DEALLOCATE, so the transaction was rolled back";
    Error::new(ErrorKind::Conflict, "commit", detail).with_source(error)
}

/// The answer was lost: ends the session, so that nothing of it is still on its way, and looks.
async fn lost(session: Session<Postgres>, ending: &End<'_>, error: sqlx::Error) -> Outcome {
    drop(session);
    let why = classify("commit", error).with_transaction(ending.fence.attempt);
    if ending.read_only {
        return Outcome::RolledBack(why);
    }
    match find_out(ending).await {
        Settled::Committed => Outcome::Committed,
        Settled::RolledBack => Outcome::RolledBack(why),
        Settled::Unknown(detail) => Outcome::InDoubt(doubt(ending.fence, detail).with_source(why)),
    }
}

/// Rolls back in one round trip, two when a statement had failed.
pub(super) async fn rollback(
    mut session: Session<Postgres>,
    ending: End<'_>,
    failed: bool,
) -> Result<()> {
    let conn = session.conn()?;
    let attempt = async {
        if failed {
            // Nothing but ROLLBACK can be sent into a failed transaction.
            return roll_back(conn, &ending, "").await;
        }
        match roll_back(conn, &ending, &prove(&ending)).await {
            Err(error) if is_other(&error) => Ok(false),
            Err(error) if !lost_reply(&error) => roll_back(conn, &ending, "").await,
            answer => answer,
        }
    };
    match timeout(ROLLBACK_PATIENCE, attempt).await {
        Ok(Ok(true)) => {
            session.release();
            Ok(())
        }
        Ok(Ok(false)) => Err(doubt(ending.fence, OTHER)),
        Ok(Err(error)) => {
            drop(session);
            give_up(&ending, error).await
        }
        Err(_) => {
            drop(session);
            give_up(&ending, sqlx::Error::PoolTimedOut).await
        }
    }
}

/// The rollback was not acknowledged. No COMMIT was sent, so the session only has to end; until
/// then it keeps its rows.
async fn give_up(ending: &End<'_>, error: sqlx::Error) -> Result<()> {
    let deadline = Instant::now() + ROLLBACK_PATIENCE;
    let ended = async {
        let mut conn = ending.store.acquire("rollback", deadline).await?;
        let ended = end_session(&mut conn, ending.fence.attempt, deadline).await;
        ended.map_err(|error| classify("rollback", error))
    };
    if timeout(ROLLBACK_PATIENCE, ended).await.is_ok_and(|ended| ended.is_ok()) {
        return Ok(());
    }
    let detail = "the rollback was not acknowledged; the connection was closed, and the store \
                  rolls back when it notices, at the latest when the lease is over";
    Err(Error::new(ErrorKind::Unavailable, "rollback", detail)
        .with_transaction(ending.fence.attempt)
        .with_source(error))
}

/// Whether the fenced transaction was rolled back, now at the latest.
async fn roll_back(
    conn: &mut PgConnection,
    ending: &End<'_>,
    prove: &str,
) -> Result<bool, sqlx::Error> {
    let Some(id) = ending.facts.id else {
        run(conn, format!("{prove}ROLLBACK")).await?;
        return Ok(true);
    };
    let message = format!("{prove}ROLLBACK; SELECT pg_xact_status('{id}'::xid8)");
    let rows = conn.fetch_all(sqlx::raw_sql(AssertSqlSafe(message))).await?;
    let status: Option<String> = match rows.last() {
        Some(row) => row.try_get(0)?,
        None => None,
    };
    Ok(status.as_deref() == Some("aborted"))
}

fn prove(ending: &End<'_>) -> String {
    match ending.facts.id {
        Some(id) => Prepared::of(ending.store.statement(ending.fence)).prove(id),
        None => prove_read(ending.fence.attempt),
    }
}

fn is_other(error: &sqlx::Error) -> bool {
    sqlstate(error) == "22P02"
        && error.as_database_error().is_some_and(|error| error.message().contains(NOT_PROVEN))
}

/// Finds out what became of a commit, for one lease at the longest.
async fn find_out(ending: &End<'_>) -> Settled {
    let deadline = Instant::now() + ending.fence.lease.get().max(Duration::from_secs(1));
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match timeout(left, look(ending, deadline)).await {
            Ok(Ok(settled)) => return settled,
            Ok(Err(error)) if Instant::now() < deadline => {
                tracing::debug!(%error, attempt = %ending.fence.attempt, "cannot settle yet");
                sleep(Duration::from_millis(50)).await;
            }
            _ => return Settled::Unknown("the store could not be asked what became of it"),
        }
    }
}

async fn look(ending: &End<'_>, deadline: Instant) -> Result<Settled> {
    const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
         SET LOCAL lock_timeout = 1000; SET LOCAL statement_timeout = 5000";
    let failed = |error| classify("commit", error);
    let conn = ending.store.acquire("commit", deadline).await?;
    let mut session = Session::<Postgres>::new(conn, ());
    end_session(session.conn()?, ending.fence.attempt, deadline).await.map_err(failed)?;
    run(session.conn()?, BEGIN).await.map_err(failed)?;
    let priors = ending.facts.fenced.priors();
    let keys: Vec<_> = priors.iter().map(|prior| prior.key.as_str().to_owned()).collect();
    let rows: Vec<(String, i64, Option<Uuid>, i64)> =
        sqlx::query_as(LOOK).bind(keys).fetch_all(session.conn()?).await.map_err(failed)?;
    run(session.conn()?, "ROLLBACK").await.map_err(failed)?;
    session.release();
    let row =
        |(resource, write_token, write_tx, mark)| Looked { resource, write_token, write_tx, mark };
    let rows: Vec<_> = rows.into_iter().map(row).collect();
    Ok(settle(ending.fence.attempt, priors, &rows))
}
