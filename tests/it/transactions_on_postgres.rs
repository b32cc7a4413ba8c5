//! Transactions over a real Redis and a real PostgreSQL.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use palisade::{Coordinator, Error, ErrorKind, SqlStore};
use sqlx::Postgres;
use sqlx::postgres::PgPoolOptions;
use tokio::sync::Barrier;

use crate::cancel::at_every_await;
use crate::support::{PostgresServer, RedisServer, wait_until};

const ADD: &str = "UPDATE account SET cents = cents + $1 WHERE name = $2";
const SOON: Duration = Duration::from_secs(10);

struct Bench {
    bank: SqlStore<Postgres>,
    coordinator: Coordinator,
    redis: RedisServer,
    postgres: PostgresServer,
}

impl Bench {
    async fn new() -> Self {
        let (redis, postgres) = (RedisServer::start(), PostgresServer::start());
        let bank = Self::bank(&postgres).await;
        bank.migrate().await.unwrap();
        let schema = "CREATE TABLE account (name TEXT PRIMARY KEY, cents BIGINT NOT NULL);
             CREATE TABLE nickname (name TEXT REFERENCES account DEFERRABLE INITIALLY DEFERRED);
             INSERT INTO account VALUES ('alice', 100), ('bob', 100);";
        sqlx::raw_sql(schema).execute(bank.pool()).await.unwrap();
        let coordinator = Self::join(&redis, &bank).await;
        Self { bank, coordinator, redis, postgres }
    }

    async fn bank(postgres: &PostgresServer) -> SqlStore<Postgres> {
        let pool = PgPoolOptions::new().max_connections(4).connect(&postgres.url()).await.unwrap();
        SqlStore::new("bank", pool)
    }

    async fn join(redis: &RedisServer, bank: &SqlStore<Postgres>) -> Coordinator {
        let mut options = palisade::LockOptions::default();
        options.hand_over.enabled = true;
        let locks = palisade::connect_with(&redis.url(), options).await.unwrap();
        Coordinator::builder(locks).store(bank).wait(Duration::from_secs(30)).build()
    }

    async fn cents(&self, name: &str) -> i64 {
        let read = "SELECT cents FROM account WHERE name = $1";
        sqlx::query_scalar(read).bind(name).fetch_one(self.bank.pool()).await.unwrap()
    }

    /// Nothing is locked, no session has a transaction open, and nothing is published.
    async fn assert_clean(&self) {
        self.coordinator.settled().await;
        let free = async || {
            let open = "SELECT count(*) FROM pg_stat_activity
                 WHERE state LIKE 'idle in transaction%' OR application_name LIKE 'palisade:%'";
            let open: i64 = sqlx::query_scalar(open).fetch_one(self.bank.pool()).await.unwrap();
            let seen = self.coordinator.locks().inspect("alice").await.unwrap();
            open == 0 && seen.holders.is_empty() && seen.waiters.is_empty()
        };
        wait_until("nothing is left", SOON, free).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_on_one_hot_key_lose_no_update() {
    let b = Bench::new().await;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let bank = Bench::bank(&b.postgres).await;
        let coordinator = Bench::join(&b.redis, &bank).await;
        for _ in 0..2 {
            let (coordinator, bank) = (coordinator.clone(), bank.clone());
            tasks.spawn(async move {
                for _ in 0..25 {
                    let work = coordinator.run(["alice"], async |tx| {
                        let db = tx.enlist(&bank).await?;
                        let read = "SELECT cents FROM account WHERE name = 'alice'";
                        let cents: i64 = sqlx::query_scalar(read).fetch_one(&db).await?;
                        let write = "UPDATE account SET cents = $1 WHERE name = 'alice'";
                        sqlx::query(write).bind(cents + 1).execute(&db).await?;
                        Ok::<_, Error>(())
                    });
                    work.await.unwrap();
                }
            });
        }
    }
    tasks.join_all().await;
    assert_eq!(b.cents("alice").await, 300);
    b.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn run_starts_over_when_the_database_finds_a_deadlock() {
    let b = Bench::new().await;
    let (attempts, both) = (AtomicU32::new(0), Arc::new(Barrier::new(2)));
    let work = async |key: &'static str, first: &'static str, second: &'static str| {
        b.coordinator
            .run([key], async |tx| {
                let db = tx.enlist(&b.bank).await?;
                sqlx::query(ADD).bind(1_i64).bind(first).execute(&db).await?;
                if attempts.fetch_add(1, Ordering::Relaxed) < 2 {
                    both.wait().await;
                }
                sqlx::query(ADD).bind(1_i64).bind(second).execute(&db).await?;
                Ok::<_, Error>(())
            })
            .await
    };
    let (one, two) = tokio::join!(work("k1", "alice", "bob"), work("k2", "bob", "alice"));
    one.unwrap();
    two.unwrap();
    assert!(attempts.load(Ordering::Relaxed) >= 3, "the database chose one of them");
    assert_eq!((b.cents("alice").await, b.cents("bob").await), (102, 102));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_constraint_that_fails_at_commit_is_a_rollback_with_its_cause() {
    let b = Bench::new().await;
    let tx = b.coordinator.transaction(["alice"]).begin().await.unwrap();
    let db = tx.enlist(&b.bank).await.unwrap();
    sqlx::query("INSERT INTO nickname VALUES ('nobody')").execute(&db).await.unwrap();
    let error = tx.commit().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Store, "{error}");
    assert!(std::error::Error::source(&error).is_some());
    b.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn run_does_not_start_over_what_would_fail_at_commit_again() {
    let b = Bench::new().await;
    let begun = AtomicU32::new(0);
    let work = async |tx: palisade::Tx| {
        begun.fetch_add(1, Ordering::Relaxed);
        let db = tx.enlist(&b.bank).await?;
        sqlx::query("INSERT INTO nickname VALUES ('nobody')").execute(&db).await?;
        Ok::<_, Error>(())
    };
    let error = b.coordinator.run(["alice"], work).await.unwrap_err();
    assert_eq!((error.kind(), begun.load(Ordering::Relaxed)), (ErrorKind::Store, 1), "{error}");
    b.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_begin_enlist_commit_or_rollback_at_any_await_leaves_nothing() {
    let b = Bench::new().await;
    for commits in [false, true] {
        let attempt = || async {
            let tx = b.coordinator.transaction(["alice", "bob"]).begin().await.unwrap();
            let db = tx.enlist(&b.bank).await.unwrap();
            sqlx::query(ADD).bind(5_i64).bind("alice").execute(&db).await.unwrap();
            sqlx::query(ADD).bind(-5_i64).bind("alice").execute(&db).await.unwrap();
            if commits { tx.commit().await.unwrap() } else { tx.rollback().await.unwrap() }
        };
        let steps = at_every_await(attempt, || b.assert_clean()).await;
        assert!(steps > 0, "{steps} awaits");
    }
    assert_eq!(b.cents("alice").await, 100, "a commit is whole or not at all");
}

#[tokio::test(flavor = "multi_thread")]
async fn nested_transactions_are_savepoints_behind_fenced_keys() {
    let b = Bench::new().await;
    let mut tx = b.coordinator.transaction(["alice"]).begin().await.unwrap();
    let db = tx.enlist(&b.bank).await.unwrap();
    sqlx::query(ADD).bind(1_i64).bind("alice").execute(&db).await.unwrap();
    let nested = tx.nested(["bob"]).await.unwrap();
    let db = nested.enlist(&b.bank).await.unwrap();
    sqlx::query("INSERT INTO account VALUES ('alice', 0)").execute(&db).await.unwrap_err();
    nested.rollback().await.unwrap();
    let token = tx.held().iter().find(|held| held.key.as_str() == "bob").unwrap().token;
    tx.commit().await.unwrap();
    assert_eq!(b.cents("alice").await, 101);
    let fenced = "SELECT write_token FROM palisade_fence WHERE resource = 'bob'";
    let fenced: i64 = sqlx::query_scalar(fenced).fetch_one(b.bank.pool()).await.unwrap();
    assert_eq!(u64::try_from(fenced).unwrap(), token.get(), "undoing the work kept the fence");
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_of_one_process_that_pass_a_lock_among_themselves_lose_no_update() {
    let b = Bench::new().await;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let (coordinator, bank) = (b.coordinator.clone(), b.bank.clone());
        tasks.spawn(async move {
            for _ in 0..5 {
                let tx = coordinator.transaction(["alice"]).begin().await.unwrap();
                let db = tx.enlist(&bank).await.unwrap();
                let read = "SELECT cents FROM account WHERE name = 'alice'";
                let cents: i64 = sqlx::query_scalar(read).fetch_one(&db).await.unwrap();
                let write = "UPDATE account SET cents = $1 WHERE name = 'alice'";
                sqlx::query(write).bind(cents + 1).execute(&db).await.unwrap();
                tx.commit().await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    assert_eq!(b.cents("alice").await, 100 + 64 * 5, "each token is above the one before");
    let info = b.redis.command(&["INFO", "commandstats"]);
    let line = info.lines().find(|line| line.starts_with("cmdstat_evalsha:")).unwrap();
    let calls: u32 =
        line.split("calls=").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    println!("{calls} commands for {} transactions", 64 * 5);
    assert!(calls < 64, "{calls} commands for {} transactions", 64 * 5);
    b.assert_clean().await;
}
