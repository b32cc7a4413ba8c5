//! Fence rows as the only locks: what a store issues, and who waits for whom. On both databases
//! where they have to agree.

use std::sync::Arc;
use std::time::Duration;

use palisade::store::{AnyBranch, Fence, Isolation, Outcome, Store};
use palisade::{Branch, ErrorKind, FencingToken, Mode, Result, SqlDatabase, SqlStore};
use sqlx::postgres::PgPoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};
use sqlx::{AssertSqlSafe, Pool, Postgres, Sqlite};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::store_fences::{
    again, commit, degraded, fence, held, rolled_back, with_lease, with_wait, write,
};
use crate::support::{Directory, Fault, PostgresServer, Proxy};

use Mode::{Exclusive as X, Shared as S};

/// What a busy machine may need.
const SOON: Duration = Duration::from_secs(30);
/// Longer than a fence statement waits for a row before it looks who is in the way.
const A_WHILE: Duration = Duration::from_millis(600);

const TABLE: &str = "CREATE TABLE account (name TEXT PRIMARY KEY, cents BIGINT NOT NULL);
    INSERT INTO account VALUES ('alice', 100);";

struct Bench {
    store: Arc<dyn Store>,
    database: Database,
}

enum Database {
    Postgres(SqlStore<Postgres>, PostgresServer),
    Sqlite(SqlStore<Sqlite>, #[allow(dead_code, reason = "it is kept")] Directory),
}

impl Bench {
    async fn both() -> [Self; 2] {
        [Self::postgres(None).await, Self::sqlite().await]
    }

    async fn postgres(isolation: Option<Isolation>) -> Self {
        let server = PostgresServer::start();
        let pool = PgPoolOptions::new().max_connections(10).connect(&server.url()).await.unwrap();
        let mut store = ready(pool).await;
        if let Some(isolation) = isolation {
            store = store.isolation(isolation);
        }
        Self { store: Arc::new(store.clone()), database: Database::Postgres(store, server) }
    }

    async fn sqlite() -> Self {
        let directory = Directory::new();
        let options = SqliteConnectOptions::new()
            .filename(directory.path().join("bank.db"))
            .journal_mode(SqliteJournalMode::Wal)
            .create_if_missing(true);
        let pool = SqlitePoolOptions::new().max_connections(10).connect_with(options).await;
        let store = ready(pool.unwrap()).await;
        Self { store: Arc::new(store.clone()), database: Database::Sqlite(store, directory) }
    }

    fn name(&self) -> &'static str {
        match self.database {
            Database::Postgres(..) => "PostgreSQL",
            Database::Sqlite(..) => "SQLite",
        }
    }

    async fn open(&self, fence: &Fence) -> Arc<dyn AnyBranch> {
        timeout(SOON, self.store.open(fence)).await.unwrap().unwrap()
    }

    async fn sql(&self, sql: &str) {
        let sql = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
        match &self.database {
            Database::Postgres(store, _) => drop(sql.execute(store.pool()).await.unwrap()),
            Database::Sqlite(store, _) => drop(sql.execute(store.pool()).await.unwrap()),
        }
    }

    /// The tokens of a row: of its last writer and of its last reader.
    async fn row(&self, key: &str) -> (i64, i64) {
        let read = "SELECT write_token, read_token FROM palisade_fence WHERE resource = $1";
        let row: Option<(i64, i64)> = match &self.database {
            Database::Postgres(store, _) => {
                sqlx::query_as(read).bind(key).fetch_optional(store.pool()).await.unwrap()
            }
            Database::Sqlite(store, _) => {
                sqlx::query_as(read).bind(key).fetch_optional(store.pool()).await.unwrap()
            }
        };
        row.unwrap_or_default()
    }

    async fn cents(&self) -> i64 {
        let read = "SELECT cents FROM account WHERE name = 'alice'";
        match &self.database {
            Database::Postgres(store, _) => {
                sqlx::query_scalar(read).fetch_one(store.pool()).await.unwrap()
            }
            Database::Sqlite(store, _) => {
                sqlx::query_scalar(read).fetch_one(store.pool()).await.unwrap()
            }
        }
    }

    /// A branch with this token commits under the key.
    async fn leave(&self, key: &str, token: u64) {
        commit(&self.open(&write(key, token)).await).await;
    }
}

async fn ready<DB: SqlDatabase>(pool: Pool<DB>) -> SqlStore<DB>
where
    for<'c> &'c mut DB::Connection: sqlx::Executor<'c, Database = DB>,
    for<'q> DB::Arguments: sqlx::IntoArguments<DB>,
{
    let store = SqlStore::new("bank", pool);
    store.migrate().await.unwrap();
    sqlx::raw_sql(TABLE).execute(store.pool()).await.unwrap();
    store
}

async fn read(branch: &Arc<dyn AnyBranch>) -> Result<i64> {
    let sql = "SELECT cents FROM account WHERE name = 'alice'";
    if let Some(db) = Branch::<Postgres>::on(branch) {
        return Ok(sqlx::query_scalar(sql).fetch_one(&db).await?);
    }
    Ok(sqlx::query_scalar(sql).fetch_one(&Branch::<Sqlite>::on(branch).unwrap()).await?)
}

async fn set(branch: &Arc<dyn AnyBranch>, cents: i64) -> Result<()> {
    let sql = "UPDATE account SET cents = $1 WHERE name = 'alice'";
    if let Some(db) = Branch::<Postgres>::on(branch) {
        sqlx::query(sql).bind(cents).execute(&db).await?;
        return Ok(());
    }
    let db = Branch::<Sqlite>::on(branch).unwrap();
    sqlx::query(sql).bind(cents).execute(&db).await?;
    Ok(())
}

fn one(key: &str) -> Fence {
    degraded(vec![held(key, X, 1)])
}

fn issued(branch: &Arc<dyn AnyBranch>) -> u64 {
    branch.issued().unwrap().get()
}

#[tokio::test]
async fn the_token_is_one_for_all_keys_and_above_rows_watermark_and_floor() {
    for b in Bench::both().await {
        b.leave("a", 70).await;
        let shared = fence(vec![held("other", X, 90), held("s", S, 90)]);
        commit(&b.open(&shared).await).await;
        let keys = |floor| vec![held("a", X, floor), held("new", X, floor), held("s", S, floor)];
        let branch = b.open(&degraded(keys(1))).await;
        assert_eq!(issued(&branch), 91, "{}", b.name());
        commit(&branch).await;
        assert_eq!((b.row("a").await, b.row("new").await), ((91, 0), (91, 0)), "{}", b.name());
        assert_eq!(b.row("s").await, (0, 91), "{}", b.name());

        b.sql("UPDATE palisade_watermark SET mark = 200").await;
        assert_eq!(issued(&b.open(&one("newer")).await), 201, "{}", b.name());
        let floor = degraded(keys(300));
        assert_eq!(issued(&b.open(&floor).await), 301, "{}", b.name());
        assert!(b.open(&write("a", 300)).await.issued().is_none());
    }
}

#[tokio::test]
async fn no_token_is_issued_that_would_not_be_one() {
    for b in Bench::both().await {
        b.leave("a", 1).await;
        let top = FencingToken::LIMIT - 1;
        for (seen, left) in [(top - 1, true), (top, false), (i64::MAX as u64, false)] {
            b.sql(&format!("UPDATE palisade_fence SET write_token = {seen}")).await;
            match b.store.open(&one("a")).await {
                Ok(branch) => {
                    assert!(left && issued(&branch) == top, "{}", b.name());
                    branch.rollback().await.unwrap();
                }
                Err(error) => {
                    assert!(!left, "{}: {error}", b.name());
                    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                }
            }
            let kept = i64::try_from(seen).unwrap();
            assert_eq!(b.row("a").await, (kept, 0), "nothing was changed");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_between_transactions_that_only_have_the_rows() {
    for isolation in [None, Some(Isolation::RepeatableRead), Some(Isolation::Serializable)] {
        nothing_is_lost(Bench::postgres(isolation).await).await;
    }
    nothing_is_lost(Bench::sqlite().await).await;
}

/// Raises a number from many tasks, with and without a lock service: here the tasks that have one
/// stand in line for a lock of this process, and get tokens that lag behind those of the store.
async fn nothing_is_lost(b: Bench) {
    let (store, lock) = (Arc::clone(&b.store), Arc::new(tokio::sync::Mutex::new(0)));
    let mut tasks = JoinSet::new();
    for task in 0..8 {
        let (store, lock) = (Arc::clone(&store), Arc::clone(&lock));
        tasks.spawn(async move {
            let (mut done, mut stale) = (0, 0);
            while done < 10 {
                // Kept until the branch has ended, as a lock is.
                let mut last = match task % 2 {
                    0 => None,
                    _ => Some(lock.lock().await),
                };
                let own = match &mut last {
                    None => degraded(vec![held("a", X, 1), held("b", X, 1)]),
                    Some(last) => {
                        **last += 1;
                        fence(vec![held("a", X, **last), held("b", X, **last)])
                    }
                };
                let branch = match (store.open(&with_wait(own, SOON)).await, &mut last) {
                    (Ok(branch), _) => branch,
                    (Err(error), Some(last)) => {
                        assert_eq!(error.kind(), ErrorKind::StaleToken, "{error}");
                        **last = error.floor().unwrap().get();
                        stale += 1;
                        continue;
                    }
                    (Err(error), None) => panic!("{error}"),
                };
                let seen = read(&branch).await.unwrap();
                tokio::task::yield_now().await;
                set(&branch, seen + 1).await.unwrap();
                commit(&branch).await;
                done += 1;
            }
            stale
        });
    }
    let stale: u32 = timeout(SOON * 4, tasks.join_all()).await.unwrap().into_iter().sum();
    println!("{}: {stale} were stale", b.name());
    assert_eq!(b.cents().await, 180, "{}", b.name());
}

#[tokio::test]
async fn a_holder_with_a_branch_open_is_waited_for_and_stale_afterwards() {
    for b in Bench::both().await {
        let holder = write("a", 1_000);
        let first = b.open(&holder).await;
        let seen = read(&first).await.unwrap();
        let (store, next) = (Arc::clone(&b.store), one("a"));
        let opening = tokio::spawn(async move { store.open(&with_wait(next, SOON)).await });
        sleep(A_WHILE).await;
        assert!(!opening.is_finished(), "{}", b.name());
        set(&first, seen + 5).await.unwrap();
        commit(&first).await;
        let next = timeout(SOON, opening).await.unwrap().unwrap().unwrap();
        assert_eq!((issued(&next), read(&next).await.unwrap()), (1_001, 105), "{}", b.name());
        commit(&next).await;
        let error = b.store.open(&again(&holder)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StaleToken, "{}: {error}", b.name());
        assert_eq!(error.floor(), FencingToken::new(1_001), "{}", b.name());
    }
}

#[tokio::test]
async fn a_row_that_is_made_meanwhile_by_a_higher_token_is_seen() {
    let isolations = [None, Some(Isolation::RepeatableRead), Some(Isolation::Serializable)];
    for isolation in isolations {
        let b = Bench::postgres(isolation).await;
        // No row of either key is there when the second looks, and both have one when it goes on.
        let first = b.open(&fence(vec![held("a", X, 1_000), held("b", S, 1_000)])).await;
        let (store, next) =
            (Arc::clone(&b.store), degraded(vec![held("a", S, 1), held("b", X, 1)]));
        let opening = tokio::spawn(async move { store.open(&with_wait(next, SOON)).await });
        sleep(Duration::from_millis(50)).await;
        commit(&first).await;
        let next = timeout(SOON, opening).await.unwrap().unwrap().unwrap();
        assert_eq!(issued(&next), 1_001, "{isolation:?}");
        commit(&next).await;
    }
}

#[tokio::test]
async fn a_holder_with_a_higher_token_waits_and_ends_nobody() {
    for b in Bench::both().await {
        for keys in [1, 5] {
            let keys = |token| (0..keys).map(|n| held(&format!("k{n}"), X, token)).collect();
            let first = b.open(&degraded(keys(1))).await;
            let seen = read(&first).await.unwrap();
            let (store, next) = (Arc::clone(&b.store), fence(keys(1_000_000)));
            let opening = tokio::spawn(async move { store.open(&with_wait(next, SOON)).await });
            sleep(A_WHILE).await;
            assert!(!opening.is_finished(), "{}", b.name());
            set(&first, seen + 5).await.unwrap();
            commit(&first).await;
            let next = timeout(SOON, opening).await.unwrap().unwrap().unwrap();
            assert_eq!(read(&next).await.unwrap(), seen + 5, "{}", b.name());
            next.rollback().await.unwrap();
        }
    }
}

#[tokio::test]
async fn whoever_stops_without_a_lock_service_keeps_its_rows_for_one_lease() {
    let b = Bench::postgres(None).await;
    let lease = Duration::from_millis(800);
    let own = Fence { state: Arc::default(), ..with_lease(one("a"), lease) };
    let stopped = b.open(&own).await;
    set(&stopped, 0).await.unwrap();
    let started = Instant::now();
    let next = b.open(&with_wait(write("a", 1_000), SOON)).await;
    assert!(started.elapsed() > lease / 2, "it was ended after {:?}", started.elapsed());
    commit(&next).await;
    let error = rolled_back(stopped.commit().await);
    assert_eq!(error.kind(), ErrorKind::Conflict, "it may start over: {error}");
    assert_eq!(b.cents().await, 100);
}

#[tokio::test]
async fn a_shared_key_keeps_others_out_and_a_branch_that_reads_changes_nothing() {
    for b in Bench::both().await {
        let reader = degraded(vec![held("a", S, 1)]);
        let branch = timeout(SOON, b.store.open_read(&reader)).await.unwrap().unwrap();
        assert!(branch.is_read_only() && branch.issued().is_some(), "{}", b.name());
        assert_eq!(read(&branch).await.unwrap(), 100);
        let impatient = with_wait(one("a"), A_WHILE);
        let error = b.store.open(&impatient).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{}: {error}", b.name());
        set(&branch, 0).await.unwrap_err();
        branch.rollback().await.unwrap();
        let error = b.store.open(&reader).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misuse, "{}: {error}", b.name());
        let next = b.open(&one("a")).await;
        assert_eq!(issued(&next), 2, "{}: the reader has left nothing", b.name());
        set(&next, 7).await.unwrap();
        commit(&next).await;
        assert_eq!(b.cents().await, 7, "{}: its connection writes again", b.name());
    }
}

#[tokio::test]
async fn an_owner_that_meets_itself_is_told() {
    for b in Bench::both().await {
        let own = one("a");
        let branch = b.open(&own).await;
        let error = b.store.open(&with_wait(again(&own), SOON)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misuse, "{}: {error}", b.name());
        commit(&branch).await;
    }
}

#[tokio::test]
async fn keys_are_added_under_a_token_of_their_own_or_refused_without_harm() {
    for b in Bench::both().await {
        b.leave("b", 50).await;
        let branch = b.open(&one("a")).await;
        assert_eq!(issued(&branch), 2, "{}", b.name());
        branch.extend(&[held("b", X, 2)]).await.unwrap();
        assert_eq!(issued(&branch), 51, "{}", b.name());
        if let Database::Postgres(..) = b.database {
            let other = b.open(&one("c")).await;
            let error = branch.extend(&[held("c", X, 51)]).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
            other.rollback().await.unwrap();
        }
        set(&branch, 9).await.unwrap();
        commit(&branch).await;
        assert_eq!((b.row("a").await.0, b.row("b").await.0), (2, 51), "{}", b.name());
        assert_eq!(b.cents().await, 9);
    }
}

#[tokio::test]
async fn a_commit_whose_reply_is_lost_is_settled() {
    let b = Bench::postgres(None).await;
    let Database::Postgres(_, server) = &b.database else { unreachable!() };
    let proxy = Proxy::start(server.port()).await;
    let url = format!("postgres://postgres@127.0.0.1:{}/postgres", proxy.port());
    let pool = PgPoolOptions::new().max_connections(2).connect(&url).await.unwrap();
    let store: Arc<dyn Store> = Arc::new(SqlStore::new("bank", pool));
    for (fault, committed) in [(Fault::LoseReply, true), (Fault::LoseRequest, false)] {
        let before = b.cents().await;
        let branch = store.open(&one("a")).await.unwrap();
        set(&branch, before + 1).await.unwrap();
        proxy.plan("COMMIT\0", fault);
        match branch.commit().await {
            Outcome::Committed => assert!(committed),
            Outcome::RolledBack(error) => assert!(!committed, "{error}"),
            Outcome::InDoubt(error) => panic!("{error}"),
        }
        assert_eq!(b.cents().await - before, i64::from(committed));
    }
}
