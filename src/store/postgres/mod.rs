//! PostgreSQL: rows are locked, so branches with different keys run side by side.
//!
//! Opening a branch takes one message and its answer (three for a branch that only reads), and so
//! does committing: statements that take no parameters travel together, and the fence is prepared
//! in the session, so that it can be called from the same message. A session that does not have it
//! yet costs one message more, and an error in the log of the server.
//!
//! Why is every branch published? A client that is stopped keeps its rows locked until its lease
//! ends the session, while a newer holder, whose lease began when the old one ended, waits. The
//! newer one finds out who is in the way, and ends the session of a holder whose time is over. What
//! a branch with few keys holds is in the name of its session; what does not fit there stands in
//! `palisade_branch`, at the price of a small transaction before the branch.
//!
//! Why the transaction's id? `COMMIT` in a failed transaction answers ROLLBACK without an error,
//! and a `COMMIT` that the program sent itself would leave the statements after it without a fence.
//! The id that the fence returned is compared in the message that commits.

mod contact;
mod ending;
mod fence;
mod opening;

use std::time::Duration;

use async_trait::async_trait;
use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Postgres};
use tokio::time::Instant;
use uuid::Uuid;

use crate::error::Result;
use crate::sql::postgres::{FENCE, MIGRATIONS, PURGE, PURGE_SESSIONS, WATERMARK, WATERMARK_SEEN};
use crate::sql::{PURGE_BATCH, PURGE_GRACE, classify, migrate};

use super::database::{Driver, Ending, Opened, Step};
use super::session::Session;
use super::sql_store::{Purged, SqlStore};
use super::verdict::Fenced;
use super::{Fence, Held, Outcome};

/// How long a migration or a purge waits for a connection.
const PATIENCE: Duration = Duration::from_secs(10);

/// How much a branch is isolated from transactions that hold none of its keys.
///
/// Transactions that share a key are isolated by its lock, at every level.
// exhaustive: the levels that PostgreSQL has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// Each statement sees what was committed before it.
    ReadCommitted,
    /// All statements see one snapshot. Nested transactions cannot add keys.
    RepeatableRead,
    /// As if transactions ran one after the other. Nested transactions cannot add keys.
    Serializable,
}

impl SqlStore<Postgres> {
    /// The isolation level of branches that write; without it, the default of the session.
    #[must_use]
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.settings.isolation = Some(isolation);
        self
    }
}

/// What a program can set.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    isolation: Option<Isolation>,
}

impl Settings {
    fn sql(self) -> &'static str {
        match self.isolation {
            None => "",
            Some(Isolation::ReadCommitted) => "ISOLATION LEVEL READ COMMITTED",
            Some(Isolation::RepeatableRead) => "ISOLATION LEVEL REPEATABLE READ",
            Some(Isolation::Serializable) => "ISOLATION LEVEL SERIALIZABLE",
        }
    }
}

/// What the fence told.
#[derive(Debug)]
pub struct Facts {
    fenced: Fenced,
    /// The transaction's id. A branch that reads has none.
    id: Option<u64>,
    /// Whether later statements see what was committed meanwhile, so that keys can be added.
    extends: bool,
}

#[async_trait]
impl Driver for Postgres {
    type Loan = ();
    type Facts = Facts;
    type Settings = Settings;
    type Shared = ();

    const FENCE: &'static str = FENCE;

    /// The server rolls back what a closed session leaves.
    fn discard(mut conn: PoolConnection<Self>, _loan: ()) {
        if tokio::runtime::Handle::try_current().is_ok() {
            conn.close_on_drop();
        } else {
            drop(conn.detach());
        }
    }

    async fn migrate(store: &SqlStore<Self>) -> Result<()> {
        let failed = |error| classify("migrate", error);
        let conn = store.acquire("migrate", Instant::now() + PATIENCE).await?;
        let mut session = Session::<Self>::new(conn, ());
        // One process at a time. The lock ends with the transaction, whatever becomes of this one.
        let begin = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
                     SELECT pg_advisory_xact_lock(hashtext('palisade'), hashtext('migrate'))";
        run(session.conn()?, begin).await.map_err(failed)?;
        migrate(session.conn()?, MIGRATIONS).await?;
        run(session.conn()?, "COMMIT").await.map_err(failed)?;
        session.release();
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
        let conn = store.acquire("purge", Instant::now() + PATIENCE).await?;
        let mut session = Session::<Self>::new(conn, ());
        loop {
            let round = purge_round(session.conn()?, older_than).await;
            let (rows, mark) = round.map_err(|error| classify("purge", error))?;
            purged.rows += rows;
            purged.watermark = u64::try_from(mark).unwrap_or(0);
            if rows < u64::from(PURGE_BATCH) {
                break;
            }
        }
        session.release();
        Ok(purged)
    }

    async fn open(store: &SqlStore<Self>, fence: &Fence) -> Result<Opened<Self>> {
        opening::open(store, fence).await
    }

    async fn open_read(store: &SqlStore<Self>, fence: &Fence) -> Result<Opened<Self>> {
        opening::open_read(store, fence).await
    }

    async fn extend(
        store: &SqlStore<Self>,
        fence: &Fence,
        open: &mut Opened<Self>,
        held: &[Held],
    ) -> Result<Result<()>, sqlx::Error> {
        opening::extend(store, fence, open, held).await
    }

    async fn savepoint(conn: &mut PgConnection, step: Step, depth: u32) -> Result<(), sqlx::Error> {
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

    async fn ping(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        conn.ping().await
    }
}

/// Sends statements of ours that take no parameters, as one message. The text is ours, or numbers,
/// ids and hex.
async fn run(conn: &mut PgConnection, sql: impl Into<String>) -> Result<(), sqlx::Error> {
    conn.execute(sqlx::raw_sql(AssertSqlSafe(sql.into()))).await.map(drop)
}

/// One step of a purge: deletes below the watermark of an earlier round, or moves the watermark
/// when nothing is left below it. Each statement is a transaction of its own, and sound by itself.
async fn purge_round(
    conn: &mut PgConnection,
    older_than: Duration,
) -> Result<(u64, i64), sqlx::Error> {
    const STATE: &str = "SELECT mark, advanced, \
         (extract(epoch FROM clock_timestamp()) * 1000000)::bigint FROM palisade_watermark";
    let (mark, advanced, now): (i64, Option<i64>, i64) =
        sqlx::query_as(STATE).fetch_one(&mut *conn).await?;
    let Some(advanced) = advanced else {
        sqlx::query(WATERMARK_SEEN).execute(&mut *conn).await?;
        return Ok((0, mark));
    };
    if now < advanced.saturating_add(micros(PURGE_GRACE)) {
        return Ok((0, mark));
    }
    let batch = i64::from(PURGE_BATCH);
    run(conn, "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE").await?;
    let deleted = sqlx::query(PURGE).bind(mark).bind(batch).execute(&mut *conn).await?;
    run(conn, "COMMIT").await?;
    if deleted.rows_affected() == u64::from(PURGE_BATCH) {
        return Ok((deleted.rows_affected(), mark));
    }
    let since = now.saturating_sub(micros(older_than));
    sqlx::query(WATERMARK).bind(since).execute(&mut *conn).await?;
    sqlx::query(WATERMARK_SEEN).execute(&mut *conn).await?;
    sqlx::query(PURGE_SESSIONS).execute(&mut *conn).await?;
    let (mark, _, _): (i64, Option<i64>, i64) = sqlx::query_as(STATE).fetch_one(conn).await?;
    Ok((deleted.rows_affected(), mark))
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
