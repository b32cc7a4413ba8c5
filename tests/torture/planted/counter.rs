//! A counter in a store behind a fence, and how often somebody was told that it was raised.

use std::sync::Arc;
use std::time::Duration;

use palisade::store::{AnyBranch, Fence, Held, Issuer, Outcome, Store};
use palisade::testing::planted_store;
use palisade::{
    Branch, ClientId, FencingToken, Lease, LeaseState, Mode, OwnerId, ResourceKey, Result,
    SqlDatabase, SqlStore,
};
use sqlx::postgres::PgPoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use sqlx::{PgPool, Pool, Postgres, Sqlite, SqlitePool};
use tokio::time::Instant;
use uuid::Uuid;

use super::bugs::Plant;
use super::holder::{Holder, LONG};
use super::service::Service;
use super::{Backend, Verdict};
use crate::support::{Directory, PostgresServer};

pub const KEY: &str = "counter";

const SCHEMA: &str = "CREATE TABLE counter (n BIGINT NOT NULL); INSERT INTO counter VALUES (0)";
const READ: &str = "SELECT n FROM counter";
const WRITE: &str = "UPDATE counter SET n = $1";

/// How long a fence waits for rows in its way, and a session for its client.
const WAIT: Duration = Duration::from_secs(10);

pub struct Counter {
    database: Database,
    store: Arc<dyn Store>,
    fences_at_commit: bool,
    acknowledged: i64,
    unknown: i64,
}

enum Database {
    Postgres(PgPool, PostgresServer),
    Sqlite(SqlitePool, Directory),
}

/// An open branch, and what it has read.
pub struct Work {
    branch: Arc<dyn AnyBranch>,
    pub seen: i64,
    /// What is fenced before it commits.
    late: Vec<Held>,
}

impl Counter {
    /// At zero, with the bug in its store, if it is one of a store.
    pub async fn start(backend: Backend, plant: Plant) -> Self {
        let (database, store) = match backend {
            Backend::RedisPostgres => {
                let server = PostgresServer::start();
                let pool = PgPoolOptions::new().connect(&server.url()).await.unwrap();
                sqlx::raw_sql(SCHEMA).execute(&pool).await.unwrap();
                (Database::Postgres(pool.clone(), server), store(pool, plant).await)
            }
            Backend::MemorySqlite => {
                let directory = Directory::new();
                let file = directory.path().join("counter.db");
                let options = SqliteConnectOptions::new().filename(file).create_if_missing(true);
                let pool = SqlitePoolOptions::new().connect_with(options).await.unwrap();
                sqlx::raw_sql(SCHEMA).execute(&pool).await.unwrap();
                (Database::Sqlite(pool.clone(), directory), store(pool, plant).await)
            }
        };
        let fences_at_commit = matches!(plant, Plant::FenceAtCommit);
        Self { database, store, fences_at_commit, acknowledged: 0, unknown: 0 }
    }

    /// Opens a branch for a process that takes itself for a holder, and reads.
    pub async fn begin(&self, holder: &Holder) -> Result<Work> {
        let held = held(KEY, holder.token());
        let (first, late) = match self.fences_at_commit {
            // A branch needs some fence to open; this one is nobody else's.
            true => (self::held(&Uuid::now_v7().to_string(), holder.token()), vec![held]),
            false => (held, Vec::new()),
        };
        let branch = self.store.open(&fence(holder.owner(), first)).await?;
        let seen = read(&branch).await?;
        Ok(Work { branch, seen, late })
    }

    /// The same for a process that is cut off from the lock service: the rows are its locks.
    pub async fn begin_without_locks(&self) -> Result<Work> {
        let owner = OwnerId::new(ClientId::random());
        let fence = fence(owner, held(KEY, FencingToken::FIRST));
        let state = Arc::default();
        let branch = self.store.open(&Fence { issuer: Issuer::Store, state, ..fence }).await?;
        let seen = read(&branch).await?;
        Ok(Work { branch, seen, late: Vec::new() })
    }

    /// Writes, commits, and counts what it is told.
    pub async fn write(&mut self, n: i64, work: Work) -> Result<()> {
        let Work { branch, late, .. } = work;
        let written = write(&branch, n).await;
        let fenced = if late.is_empty() { Ok(()) } else { branch.extend(&late).await };
        if let (Ok(()), Err(stale)) = (&written, fenced) {
            branch.rollback().await?;
            return Err(stale);
        }
        match branch.commit().await {
            Outcome::Committed => self.acknowledged += 1,
            Outcome::RolledBack(error) => return Err(error),
            Outcome::InDoubt(error) => {
                self.unknown += 1;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Reads in a branch of its own.
    pub async fn look(&self, holder: &Holder) -> Result<i64> {
        let Work { branch, seen, .. } = self.begin(holder).await?;
        match branch.commit().await {
            Outcome::Committed => Ok(seen),
            Outcome::RolledBack(error) | Outcome::InDoubt(error) => Err(error),
        }
    }

    /// Raises it by one as a holder does that nothing happens to.
    pub async fn raise(&mut self, service: &Service) -> Result<()> {
        let mut holder = Holder::new(service, KEY, LONG);
        holder.acquire().await;
        let work = self.begin(&holder).await?;
        self.write(work.seen + 1, work).await?;
        holder.release().await;
        Ok(())
    }

    /// The counter says what was acknowledged.
    pub async fn check(&self) -> Verdict {
        let n: i64 = match &self.database {
            Database::Postgres(pool, _) => sqlx::query_scalar(READ).fetch_one(pool).await.unwrap(),
            Database::Sqlite(pool, _) => sqlx::query_scalar(READ).fetch_one(pool).await.unwrap(),
        };
        let Self { acknowledged, unknown, .. } = self;
        let seen = format!("{acknowledged} acknowledged, {unknown} unknown, the counter is at {n}");
        match n {
            n if n < *acknowledged => Err(format!("{} lost: {seen}", acknowledged - n)),
            n if n > acknowledged + unknown => Err(format!("refused, but there: {seen}")),
            _ => Ok(seen),
        }
    }
}

/// The store with the bug in it. A healthy one has left a fence row there.
async fn store<DB: SqlDatabase>(pool: Pool<DB>, plant: Plant) -> Arc<dyn Store> {
    let store = SqlStore::new("counter", pool);
    store.migrate().await.unwrap();
    let first = fence(OwnerId::new(ClientId::random()), held(KEY, FencingToken::FIRST));
    let outcome = Store::open(&store, &first).await.unwrap().commit().await;
    assert!(matches!(outcome, Outcome::Committed), "{outcome:?}");
    let edits = if let Plant::Fence(edits) = plant { edits } else { &[] };
    Arc::new(planted_store(&store, edits).unwrap())
}

/// What a process shows to the store. It has just looked at its clock, and its lease was not over;
/// what comes next, a pause included, it cannot know.
fn fence(owner: OwnerId, held: Held) -> Fence {
    Fence {
        attempt: Uuid::now_v7(),
        owner,
        held: vec![held],
        issuer: Issuer::LockService,
        lease: Lease::new(WAIT).unwrap(),
        state: Arc::new(LeaseState::new(Instant::now() + LONG)),
        deadline: Instant::now() + WAIT,
    }
}

fn held(key: &str, token: FencingToken) -> Held {
    Held { key: ResourceKey::parse(key).unwrap(), mode: Mode::Exclusive, token }
}

async fn read(branch: &Arc<dyn AnyBranch>) -> sqlx::Result<i64> {
    if let Some(db) = Branch::<Postgres>::on(branch) {
        return sqlx::query_scalar(READ).fetch_one(&db).await;
    }
    let db = Branch::<Sqlite>::on(branch).expect("a branch of one of the two");
    sqlx::query_scalar(READ).fetch_one(&db).await
}

async fn write(branch: &Arc<dyn AnyBranch>, n: i64) -> sqlx::Result<()> {
    if let Some(db) = Branch::<Postgres>::on(branch) {
        return sqlx::query(WRITE).bind(n).execute(&db).await.map(drop);
    }
    let db = Branch::<Sqlite>::on(branch).expect("a branch of one of the two");
    sqlx::query(WRITE).bind(n).execute(&db).await.map(drop)
}
