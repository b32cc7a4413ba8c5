//! SQLite: one writer at a time, in this process or another.
//!
//! A branch takes the database's write lock with `BEGIN IMMEDIATE` and keeps it to its end, so every
//! branch of a file stands in line, whatever its keys. There is no session that a server could end: a
//! process that is *stopped* while it has a branch open blocks the writers of the file until it goes
//! on or dies. Give each transaction little to do, or use a server.
//!
//! A database in memory lives in its one connection, which palisade never closes while it can be proven
//! clean; but sqlx drops it when a call is cancelled while the pool tests it. Build such a pool with
//! `test_before_acquire(false)`.
//!
//! Why a savepoint right after the fence? `COMMIT` of another transaction than the one that was fenced,
//! after the program sent a `COMMIT` of its own, would go unnoticed; `RELEASE` of a savepoint that only
//! the fenced transaction has does not.
//!
//! Why no `busy_timeout`? It would hold the connection's thread beyond the fence's deadline. Waiting is
//! done here, and the setting is put back with the connection.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, Executor, Sqlite, SqliteConnection};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout_at};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::sql::sqlite::{FENCE, LOOK, MIGRATIONS, PURGE, TOKENS, WATERMARK, json};
use crate::sql::{PURGE_BATCH, PURGE_GRACE, classify, kind_of, migrate, refuse};
use crate::types::{Mode, OwnerId, Want};

use super::core::doubt;
use super::database::{Driver, Ending, Opened, Step};
use super::session::Session;
use super::sql_store::{Purged, SqlStore};
use super::verdict::{Fenced, Looked, Settled, Tokens, overtaken, settle, stale};
use super::{Fence, Held, Outcome};

/// How long a migration, a purge or a look may wait for the write lock.
const PATIENCE: Duration = Duration::from_secs(10);

/// The line of this process's branches for the one write lock of the database. Without it they would
/// poll for the lock; and an owner that meets itself would wait for itself.
#[derive(Debug)]
pub struct Gate {
    line: Arc<Semaphore>,
    inside: Arc<Mutex<Option<OwnerId>>>,
}

/// The right to try for the write lock.
#[derive(Debug)]
pub struct Pass {
    inside: Arc<Mutex<Option<OwnerId>>>,
    _permit: OwnedSemaphorePermit,
}

/// What goes back with a connection.
#[derive(Debug, Default)]
pub struct Loan {
    busy_ms: Option<i64>,
    pass: Option<Pass>,
}

type Row = (String, Option<Uuid>);

impl Default for Gate {
    fn default() -> Self {
        Self { line: Arc::new(Semaphore::new(1)), inside: Arc::default() }
    }
}

impl Gate {
    async fn enter(&self, fence: &Fence) -> Result<Pass> {
        let inside = *self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        if inside == Some(fence.owner) {
            let detail = "this owner already has a branch open in this store, and would wait for \
                          itself; use that branch, or end it first";
            return Err(Error::new(ErrorKind::Misuse, "fence", detail));
        }
        match timeout_at(fence.deadline, Arc::clone(&self.line).acquire_owned()).await {
            Ok(Ok(permit)) => {
                *self.inside.lock().unwrap_or_else(PoisonError::into_inner) = Some(fence.owner);
                Ok(Pass { inside: Arc::clone(&self.inside), _permit: permit })
            }
            _ => Err(blocked()),
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        *self.inside.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[async_trait]
impl Driver for Sqlite {
    type Loan = Loan;
    type Facts = Fenced;
    type Settings = ();
    type Shared = Gate;

    /// Nothing is closed that can be proven clean: the database may live in this connection's memory.
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
        let mut session = begin(store, "fence", Some(fence), fence.deadline).await?;
        let passed = pass(session.conn()?, fence, &fence.held, Some(fence.attempt)).await;
        let passed = match passed {
            Ok(passed) => passed,
            Err(error) => return Err(end_refused(session, error).await),
        };
        let sql = format!("SAVEPOINT {}", probe(fence));
        run(session.conn()?, sql).await.map_err(|error| classify("fence", error))?;
        let mut facts = Fenced::default();
        facts.add(&fence.held, &passed);
        Ok(Opened { session, facts })
    }

    async fn open_read(store: &SqlStore<Self>, fence: &Fence) -> Result<Opened<Self>> {
        let mut session = begin(store, "fence", Some(fence), fence.deadline).await?;
        if let Err(error) = pass(session.conn()?, fence, &fence.held, None).await {
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
            None => Ok(Opened { session, facts: Fenced::default() }),
        }
    }

    async fn extend(
        _store: &SqlStore<Self>,
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
        let passed = match pass(conn, fence, &missing, Some(fence.attempt)).await {
            Ok(passed) => passed,
            Err(error) => {
                run(conn, "ROLLBACK TO palisade_extend; RELEASE palisade_extend").await?;
                return Ok(Err(error));
            }
        };
        run(conn, "RELEASE palisade_extend").await?;
        open.facts.add(&missing, &passed);
        Ok(Ok(()))
    }

    async fn savepoint(
        conn: &mut SqliteConnection,
        step: Step,
        depth: u32,
    ) -> Result<(), sqlx::Error> {
        run(conn, step.sql(depth)).await
    }

    async fn commit(mut session: Session<Self>, ending: Ending<'_, Self>) -> Outcome {
        match finish(&mut session, &ending).await {
            Ok(()) => {
                give_back(session).await;
                Outcome::Committed
            }
            Err(End::Other) => other_transaction(session, &ending),
            Err(End::Failed(error)) => {
                let open = match session.conn() {
                    Ok(conn) => run(conn, "ROLLBACK").await.is_ok(),
                    Err(_) => false,
                };
                let why = classify("commit", error).with_transaction(ending.fence.attempt);
                if open {
                    // It could be rolled back, so it was open, so it was not committed.
                    give_back(session).await;
                    return Outcome::RolledBack(why);
                }
                drop(session);
                match look(&ending).await {
                    Settled::Committed => Outcome::Committed,
                    Settled::RolledBack => Outcome::RolledBack(why),
                    Settled::Unknown(detail) => {
                        Outcome::InDoubt(doubt(ending.fence, detail).with_source(why))
                    }
                }
            }
        }
    }

    async fn rollback(
        mut session: Session<Self>,
        ending: Ending<'_, Self>,
        failed: bool,
    ) -> Result<()> {
        let sql = match ending.read_only {
            true => "ROLLBACK".to_owned(),
            false => format!("ROLLBACK TO {}; ROLLBACK", probe(ending.fence)),
        };
        match run(session.conn()?, sql).await {
            Ok(()) => {
                give_back(session).await;
                Ok(())
            }
            Err(_) if ending.read_only => Ok(()),
            Err(error) => {
                drop(session);
                // SQLite rolls back on its own after some failures, such as a full disk; then the
                // rows are as they were.
                if failed && look(&ending).await == Settled::RolledBack {
                    return Ok(());
                }
                Err(doubt(ending.fence, OTHER).with_source(error))
            }
        }
    }

    async fn ping(_conn: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        Ok(())
    }
}

const OTHER: &str = "the transaction that was fenced has ended already: a COMMIT or ROLLBACK was \
                     sent through the branch";

/// Why a branch did not commit.
enum End {
    /// The open transaction is not the one that was fenced.
    Other,
    Failed(sqlx::Error),
}

/// Sends statements of ours that take no parameters. The text is ours, or numbers and ids.
async fn run(conn: &mut SqliteConnection, sql: impl Into<String>) -> Result<(), sqlx::Error> {
    conn.execute(sqlx::raw_sql(AssertSqlSafe(sql.into()))).await.map(drop)
}

/// A connection with the write lock. With a fence, in line with the branches of this process.
async fn begin(
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
async fn pause(error: sqlx::Error, deadline: Instant) -> Result<(), sqlx::Error> {
    if kind_of(&error) != ErrorKind::Conflict || Instant::now() >= deadline {
        return Err(error);
    }
    sleep(Duration::from_micros(fastrand::u64(500..5_000))).await;
    Ok(())
}

fn blocked() -> Error {
    let detail = "the database was locked by another branch or process until the deadline";
    Error::new(ErrorKind::Conflict, "fence", detail)
}

/// The savepoint that only the fenced transaction has.
fn probe(fence: &Fence) -> String {
    format!("palisade_tx_{}", fence.attempt.simple())
}

/// Shows the tokens to the rows of `held`, all of them or with an error.
async fn pass(
    conn: &mut SqliteConnection,
    fence: &Fence,
    held: &[Held],
    attempt: Option<Uuid>,
) -> Result<Vec<Row>> {
    let passed: Vec<Row> = sqlx::query_as(FENCE)
        .bind(array(held))
        .bind(fence.owner.as_uuid())
        .bind(attempt)
        .fetch_all(&mut *conn)
        .await
        .map_err(|error| classify("fence", error))?;
    if passed.len() == held.len() {
        return Ok(passed);
    }
    let rows = tokens(conn, held).await.map_err(|error| classify("fence", error))?;
    Err(stale(held, &passed, &rows))
}

fn array(held: &[Held]) -> String {
    json(
        held.iter().map(|held| (held.key.as_str(), held.mode == Mode::Exclusive, held.token.get())),
    )
}

async fn tokens(conn: &mut SqliteConnection, held: &[Held]) -> Result<Vec<Tokens>, sqlx::Error> {
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
async fn end_refused(mut session: Session<Sqlite>, error: Error) -> Error {
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
async fn give_back(mut session: Session<Sqlite>) {
    let restored = match session.parts() {
        Ok((conn, loan)) => restore(conn, loan).await,
        Err(_) => return,
    };
    if restored.is_ok() {
        session.release();
    }
}

async fn restore(conn: &mut SqliteConnection, loan: &Loan) -> Result<(), sqlx::Error> {
    match loan.busy_ms {
        Some(ms) => run(conn, format!("PRAGMA query_only = 0; PRAGMA busy_timeout = {ms}")).await,
        None => Ok(()),
    }
}

/// Proves the transaction and commits it. A reader elsewhere may keep the file busy for a moment.
async fn finish(session: &mut Session<Sqlite>, ending: &Ending<'_, Sqlite>) -> Result<(), End> {
    let conn = session.conn().map_err(|error| End::Failed(refuse(error)))?;
    if !ending.read_only {
        let sql = format!("RELEASE {}", probe(ending.fence));
        run(conn, sql).await.map_err(|_| End::Other)?;
    }
    loop {
        match run(conn, "COMMIT").await {
            Ok(()) => return Ok(()),
            Err(error) if !ending.fence.state.is_held() => return Err(End::Failed(error)),
            Err(error) => {
                let deadline = ending.fence.state.deadline().unwrap_or_else(Instant::now);
                pause(error, deadline).await.map_err(End::Failed)?;
            }
        }
    }
}

fn other_transaction(session: Session<Sqlite>, ending: &Ending<'_, Sqlite>) -> Outcome {
    drop(session);
    Outcome::InDoubt(doubt(ending.fence, OTHER))
}

/// Looks under the write lock what became of a commit, for one lease at the longest.
async fn look(ending: &Ending<'_, Sqlite>) -> Settled {
    let patience = ending.fence.lease.get().max(Duration::from_secs(1));
    let deadline = Instant::now() + patience;
    let priors = ending.facts.priors();
    let keys = json(priors.iter().map(|prior| (prior.key.as_str(), true, prior.token.get())));
    let attempt = async || -> Result<Settled> {
        let mut session = begin(ending.store, "commit", None, deadline).await?;
        let rows: Vec<(String, i64, Option<Uuid>, i64)> = sqlx::query_as(LOOK)
            .bind(keys.as_str())
            .fetch_all(session.conn()?)
            .await
            .map_err(|error| classify("commit", error))?;
        run(session.conn()?, "ROLLBACK").await.map_err(|error| classify("commit", error))?;
        give_back(session).await;
        let row = |(resource, write_token, write_tx, mark)| Looked {
            resource,
            write_token,
            write_tx,
            mark,
        };
        let rows: Vec<_> = rows.into_iter().map(row).collect();
        Ok(settle(ending.fence.attempt, priors, &rows))
    };
    loop {
        match attempt().await {
            Ok(settled) => return settled,
            Err(_) if Instant::now() < deadline => sleep(Duration::from_millis(50)).await,
            Err(_) => return Settled::Unknown("the store could not be asked what became of it"),
        }
    }
}

/// One step of a purge, in one transaction: deletes below the watermark of an earlier round, or moves
/// the watermark when nothing is left below it.
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
