//! SQLite: one writer at a time, in this process or another.
//!
//! A branch takes the database's write lock with `BEGIN IMMEDIATE` and keeps it to its end, so
//! every branch of a file stands in line, whatever its keys. There is no session that a server
//! could end: a process that is *stopped* while it has a branch open blocks the writers of the file
//! until it goes on or dies. Give each transaction little to do, or use a server.
//!
//! A database in memory lives in its one connection, which palisade never closes while it can be
//! proven clean; but sqlx drops it when a call is cancelled while the pool tests it. Build such a
//! pool with `test_before_acquire(false)`.
//!
//! Why a savepoint right after the fence? `COMMIT` of another transaction than the one that was
//! fenced, after the program sent a `COMMIT` of its own, would go unnoticed; `RELEASE` of a
//! savepoint that only the fenced transaction has does not.
//!
//! Why no `busy_timeout`? It would hold the connection's thread beyond the fence's deadline.
//! Waiting is done here, and the setting is put back with the connection.

mod ending;
mod gate;
mod opening;

use std::time::Duration;

use async_trait::async_trait;
use sqlx::pool::PoolConnection;
use sqlx::{Sqlite, SqliteConnection};
use tokio::time::Instant;
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::sql::sqlite::{FENCE, MIGRATIONS, PURGE, STORE_FENCE, WATERMARK};
use crate::sql::{PURGE_BATCH, PURGE_GRACE, classify, migrate, refuse};
use crate::types::Want;

use self::gate::{Gate, Pass};
use self::opening::{begin, end_refused, give_back, pass, pause, probe, restore, run, tokens};
use super::database::{Driver, Ending, Opened, Step};
use super::session::Session;
use super::sql_store::{Purged, SqlStore};
use super::verdict::{Fenced, overtaken};
use super::{Fence, Held, Issuer, Outcome};

/// How long a migration, a purge or a look may wait for the write lock.
const PATIENCE: Duration = Duration::from_secs(10);

/// What goes back with a connection.
#[derive(Debug, Default)]
pub struct Loan {
    busy_ms: Option<i64>,
    pass: Option<Pass>,
}

#[async_trait]
impl Driver for Sqlite {
    type Loan = Loan;
    type Facts = Fenced;
    type Settings = ();
    type Shared = Gate;

    const FENCE: &'static str = FENCE;
    const STORE_FENCE: &'static str = STORE_FENCE;

    /// Nothing is closed that can be proven clean: the database may live in this connection's
    /// memory.
    fn discard(mut conn: PoolConnection<Self>, loan: Loan) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            drop(conn.detach());
            return;
        };
        runtime.spawn(async move {
            // What was sent before is done before this, so it cannot come too early.
            let _ = run(&mut conn, "ROLLBACK").await;
            let clean = run(&mut conn, "BEGIN; ROLLBACK").await.is_ok();
            if !clean || restore(&mut conn, &loan).await.is_err() {
                conn.close_on_drop();
            }
            drop((conn, loan));
        });
    }

    async fn migrate(store: &SqlStore<Self>) -> Result<()> {
        let mut session = begin(store, "migrate", None, Instant::now() + PATIENCE).await?;
        migrate(session.conn()?, MIGRATIONS).await?;
        run(session.conn()?, "COMMIT").await.map_err(|error| classify("migrate", error))?;
        give_back(session).await;
        Ok(())
    }

    async fn id(store: &SqlStore<Self>) -> Result<Option<Uuid>> {
        let mut conn = store.acquire("store id", Instant::now() + PATIENCE).await?;
        sqlx::query_scalar("SELECT id FROM palisade_store")
            .fetch_optional(&mut *conn)
            .await
            .map_err(|error| classify("store id", error))
    }

    async fn purge(store: &SqlStore<Self>, older_than: Duration) -> Result<Purged> {
        let mut purged = Purged::default();
        loop {
            let mut session = begin(store, "purge", None, Instant::now() + PATIENCE).await?;
            let round = purge_round(session.conn()?, older_than).await;
            let (rows, mark) = round.map_err(|error| classify("purge", error))?;
            run(session.conn()?, "COMMIT").await.map_err(|error| classify("purge", error))?;
            give_back(session).await;
            purged.rows += rows;
            purged.watermark = u64::try_from(mark).unwrap_or(0);
            if rows < u64::from(PURGE_BATCH) {
                return Ok(purged);
            }
        }
    }

    async fn open(store: &SqlStore<Self>, fence: &Fence) -> Result<Opened<Self>> {
        open(store, fence, "").await
    }

    async fn open_read(store: &SqlStore<Self>, fence: &Fence) -> Result<Opened<Self>> {
        if fence.issuer == Issuer::Store {
            let mut opened = open(store, fence, "; PRAGMA query_only = 1").await?;
            // Without priors it takes no further keys, as one that reads a snapshot.
            opened.facts = Fenced::default();
            return Ok(opened);
        }
        let mut session = begin(store, "fence", Some(fence), fence.deadline).await?;
        if let Err(error) = pass(session.conn()?, store, fence, &fence.held, None).await {
            return Err(end_refused(session, error).await);
        }
        while let Err(error) = run(session.conn()?, "COMMIT").await {
            pause(error, fence.deadline).await.map_err(|error| classify("fence", error))?;
        }
        session.loan.pass = None;
        let rows = loop {
            let result = match run(session.conn()?, "PRAGMA query_only = 1; BEGIN").await {
                Ok(()) => tokens(session.conn()?, &fence.held).await,
                Err(error) => Err(error),
            };
            match result {
                Ok(rows) => break rows,
                Err(error) => {
                    let _ = run(session.conn()?, "ROLLBACK").await;
                    pause(error, fence.deadline).await.map_err(|error| classify("fence", error))?;
                }
            }
        };
        match overtaken(fence, &rows) {
            Some(error) => Err(end_refused(session, error).await),
            None => Ok(Opened { session, facts: Fenced::default(), issued: None }),
        }
    }

    async fn extend(
        store: &SqlStore<Self>,
        fence: &Fence,
        open: &mut Opened<Self>,
        held: &[Held],
    ) -> Result<Result<()>, sqlx::Error> {
        let missing = open.facts.missing(held);
        if missing.is_empty() {
            return Ok(Ok(()));
        }
        let conn = open.session.conn().map_err(refuse)?;
        if open.facts.priors().is_empty() {
            let wants = missing.iter().map(|held| Want::new(held.key.clone(), held.mode)).collect();
            let detail = "a branch that reads a snapshot cannot take further keys; declare them \
                          when the transaction begins";
            return Ok(Err(
                Error::new(ErrorKind::WouldDeadlock, "fence", detail).with_declare(wants)
            ));
        }
        run(conn, "SAVEPOINT palisade_extend").await?;
        let taken = match pass(conn, store, fence, &missing, Some(fence.attempt)).await {
            Ok(taken) => taken,
            Err(error) => {
                run(conn, "ROLLBACK TO palisade_extend; RELEASE palisade_extend").await?;
                return Ok(Err(error));
            }
        };
        run(conn, "RELEASE palisade_extend").await?;
        open.facts.add(&missing, &taken.passed, taken.issued);
        open.issued = taken.issued;
        Ok(Ok(()))
    }

    async fn savepoint(
        conn: &mut SqliteConnection,
        step: Step,
        depth: u32,
    ) -> Result<(), sqlx::Error> {
        run(conn, step.sql(depth)).await
    }

    async fn commit(session: Session<Self>, ending: Ending<'_, Self>) -> Outcome {
        ending::commit(session, ending).await
    }

    async fn rollback(
        session: Session<Self>,
        ending: Ending<'_, Self>,
        failed: bool,
    ) -> Result<()> {
        ending::rollback(session, ending, failed).await
    }

    async fn ping(_conn: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        Ok(())
    }
}

/// Begins, takes the rows, and sets the savepoint that proves the transaction; `and` follows it.
async fn open(store: &SqlStore<Sqlite>, fence: &Fence, and: &str) -> Result<Opened<Sqlite>> {
    let mut session = begin(store, "fence", Some(fence), fence.deadline).await?;
    let taken = pass(session.conn()?, store, fence, &fence.held, Some(fence.attempt)).await;
    let taken = match taken {
        Ok(taken) => taken,
        Err(error) => return Err(end_refused(session, error).await),
    };
    let sql = format!("SAVEPOINT {}{and}", probe(fence));
    run(session.conn()?, sql).await.map_err(|error| classify("fence", error))?;
    let mut facts = Fenced::default();
    facts.add(&fence.held, &taken.passed, taken.issued);
    Ok(Opened { session, facts, issued: taken.issued })
}

/// One step of a purge, in one transaction: deletes below the watermark of an earlier round, or
/// moves the watermark when nothing is left below it.
async fn purge_round(
    conn: &mut SqliteConnection,
    older_than: Duration,
) -> Result<(u64, i64), sqlx::Error> {
    const STATE: &str = "SELECT mark, advanced, \
         CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER) FROM palisade_watermark";
    let (mark, advanced, now): (i64, i64, i64) =
        sqlx::query_as(STATE).fetch_one(&mut *conn).await?;
    if now < advanced.saturating_add(micros(PURGE_GRACE)) {
        return Ok((0, mark));
    }
    let deleted = sqlx::query(PURGE).bind(mark).bind(PURGE_BATCH).execute(&mut *conn).await?;
    if deleted.rows_affected() == u64::from(PURGE_BATCH) {
        return Ok((deleted.rows_affected(), mark));
    }
    let since = now.saturating_sub(micros(older_than));
    sqlx::query(WATERMARK).bind(since).bind(now).execute(&mut *conn).await?;
    let (mark, _, _): (i64, i64, i64) = sqlx::query_as(STATE).fetch_one(conn).await?;
    Ok((deleted.rows_affected(), mark))
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
