//! The counters, in either database.

use std::collections::BTreeMap;
use std::time::Duration;

use palisade::testing::planted_store;
use palisade::{Coordinator, Error, ErrorKind, Fallback, Locks, SqlStore, TransactionRequest, Tx};
use sqlx::postgres::PgPoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};
use sqlx::{Postgres, Sqlite};
use tokio::time::sleep;

use super::Operation;
use crate::Result;
use crate::planted::edits::{postgres, sqlite};

/// How many counters a phase has.
pub const COUNTERS: usize = 10;

/// A store of either kind.
#[derive(Clone, Debug)]
pub enum Store {
    Sqlite(SqlStore<Sqlite>),
    Postgres(SqlStore<Postgres>),
}

/// A write that is in the store.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Row {
    pub id: String,
    pub key: String,
    pub value: i64,
    pub token: i64,
    pub owner: String,
}

/// Does the same with a store of either kind. The SQL is the same; the types are not.
macro_rules! either {
    ($store:expr, $of:ident => $work:expr) => {
        match $store {
            Store::Sqlite($of) => $work,
            Store::Postgres($of) => $work,
        }
    };
}

/// Writes what an operation says, and signs it.
macro_rules! write_down {
    ($operation:expr, $db:expr) => {
        sqlx::query(SIGN)
            .bind(&$operation.id)
            .bind(&$operation.key)
            .bind($operation.written)
            .bind($operation.token.map(|token| token as i64))
            .bind(&$operation.owner)
            .execute($db)
            .await?;
        sqlx::query(SET).bind($operation.written).bind(&$operation.key).execute($db).await?
    };
}

const TABLES: &str = "
    CREATE TABLE counter (key TEXT PRIMARY KEY, value BIGINT NOT NULL);
    CREATE TABLE written (
        id TEXT PRIMARY KEY, key TEXT NOT NULL, value BIGINT NOT NULL,
        token BIGINT NOT NULL, owner TEXT NOT NULL
    );";
const COUNTER: &str = "INSERT INTO counter (key, value) VALUES ($1, 0)";
const READ: &str = "SELECT value FROM counter WHERE key = $1";
const SET: &str = "UPDATE counter SET value = $1 WHERE key = $2";
/// Written in the same transaction as the counter, so that a lost update has a name.
const SIGN: &str = "
    INSERT INTO written (id, key, value, token, owner) VALUES ($1, $2, $3, $4, $5)";

impl Store {
    pub async fn open(url: &str, tasks: usize) -> Result<Self> {
        let connections = tasks as u32 + 2;
        // More would only wait for each other: one branch at a time has the file.
        let few = if url.starts_with("sqlite:") { 4 } else { connections };
        Self::open_with(url, connections.min(few)).await
    }

    pub async fn open_with(url: &str, connections: u32) -> Result<Self> {
        if let Some(path) = url.strip_prefix("sqlite:") {
            let options = SqliteConnectOptions::new()
                .filename(path)
                .create_if_missing(true)
                .busy_timeout(Duration::from_secs(10))
                .journal_mode(SqliteJournalMode::Wal);
            let pool = SqlitePoolOptions::new().max_connections(connections);
            return Ok(Self::Sqlite(SqlStore::new("store", pool.connect_with(options).await?)));
        }
        let pool = PgPoolOptions::new().max_connections(connections).connect(url).await?;
        Ok(Self::Postgres(SqlStore::new("store", pool)))
    }

    /// Makes the tables.
    pub async fn create(&self) -> Result<()> {
        either!(self, store => {
            store.migrate().await?;
            sqlx::raw_sql(TABLES).execute(store.pool()).await?;
        });
        Ok(())
    }

    /// Makes counters at zero.
    pub async fn add_counters(&self, keys: &[String]) -> Result<()> {
        for key in keys {
            either!(self, store => {
                sqlx::query(COUNTER).bind(key).execute(store.pool()).await?;
            });
        }
        Ok(())
    }

    pub fn coordinator(&self, locks: Locks, lease: Duration, wait: Duration) -> Coordinator {
        let builder = Coordinator::builder(locks).lease(lease).wait(wait);
        either!(self, store => builder.store(store)).build()
    }

    /// The same store with a bug: where there is no lock service, no fence row is taken.
    pub fn without_store_fence(&self) -> Result<Self> {
        Ok(match self {
            Self::Sqlite(store) => Self::Sqlite(planted_store(store, &sqlite::NO_STORE_FENCE)?),
            Self::Postgres(store) => {
                Self::Postgres(planted_store(store, &postgres::NO_STORE_FENCE)?)
            }
        })
    }

    /// A transaction that goes on without its lock service.
    pub fn falling_back(&self, request: TransactionRequest) -> TransactionRequest {
        let request = request.fallback(Fallback::StoreFence);
        either!(self, store => request.stores([store]))
    }

    /// Adds one behind the fence: reads in a branch that only reads, thinks, and writes in one that
    /// writes, where the first is not one already.
    pub async fn add_in_two_steps(
        &self,
        tx: &Tx,
        operation: &mut Operation,
        think: Duration,
    ) -> palisade::Result<()> {
        either!(self, store => {
            let read: i64 = {
                let db = tx.read(store).await?;
                sqlx::query_scalar(READ).bind(&operation.key).fetch_one(&db).await?
            };
            operation.reads(read);
            sleep(think).await;
            let db = tx.enlist(store).await?;
            write_down!(operation, &db);
        });
        Ok(())
    }

    /// Adds one behind the fence: reads, thinks, writes.
    pub async fn add_fenced(
        &self,
        tx: &Tx,
        operation: &mut Operation,
        think: Duration,
    ) -> palisade::Result<()> {
        either!(self, store => {
            let db = tx.enlist(store).await?;
            let read: i64 = sqlx::query_scalar(READ).bind(&operation.key).fetch_one(&db).await?;
            operation.reads(read);
            sleep(think).await;
            write_down!(operation, &db);
        });
        Ok(())
    }

    pub async fn read(&self, key: &str) -> palisade::Result<i64> {
        Ok(either!(self, store => {
            sqlx::query_scalar(READ).bind(key).fetch_one(store.pool()).await?
        }))
    }

    /// Writes what `operation` says, as a program without a fence does. An error that is in doubt
    /// is that of the commit.
    pub async fn write_plainly(&self, operation: &Operation) -> palisade::Result<()> {
        either!(self, store => {
            let mut tx = store.pool().begin().await?;
            write_down!(operation, &mut *tx);
            tx.commit().await.map_err(in_doubt)?;
        });
        Ok(())
    }

    /// How many sessions the database has ended, or was told to end. The workers whose branches
    /// they were are counted by what they noticed first, as a rule the loss of the lease.
    pub async fn ended_sessions(&self) -> Result<u64> {
        // Through JSON, because servers before version 14 do not have these columns.
        let count = "SELECT coalesce((to_jsonb(d) ->> 'sessions_killed')::bigint, 0)
            + coalesce((to_jsonb(d) ->> 'sessions_fatal')::bigint, 0)
            FROM pg_stat_database AS d WHERE datname = current_database()";
        let Self::Postgres(store) = self else { return Ok(0) };
        let count: i64 = sqlx::query_scalar(count).fetch_one(store.pool()).await?;
        Ok(count as u64)
    }

    /// The counters whose names begin with `prefix`.
    pub async fn counters(&self, prefix: &str) -> Result<BTreeMap<String, i64>> {
        let read = "SELECT key, value FROM counter WHERE key LIKE $1 || '%'";
        let rows: Vec<(String, i64)> = either!(self, store => {
            sqlx::query_as(read).bind(prefix).fetch_all(store.pool()).await?
        });
        Ok(rows.into_iter().collect())
    }

    /// What was written to them.
    pub async fn rows(&self, prefix: &str) -> Result<Vec<Row>> {
        type Tuple = (String, String, i64, i64, String);
        let read = "SELECT id, key, value, token, owner FROM written WHERE key LIKE $1 || '%'";
        let rows: Vec<Tuple> = either!(self, store => {
            sqlx::query_as(read).bind(prefix).fetch_all(store.pool()).await?
        });
        let row = |(id, key, value, token, owner)| Row { id, key, value, token, owner };
        Ok(rows.into_iter().map(row).collect())
    }
}

/// A COMMIT that was sent and not answered may have happened.
fn in_doubt(error: sqlx::Error) -> Error {
    Error::new(ErrorKind::InDoubt, "commit", "the reply was lost").with_source(error)
}
