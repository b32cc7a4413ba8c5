//! Transactions whose lock service is away: killed, or cut off for some of those who share the
//! store, and what its fallback makes of that.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use palisade::backend::{RedisBackend, RedisOptions};
use palisade::{
    Coordinator, Error, ErrorKind, Fallback, LockOptions, Locks, Mode, Result, SqlDatabase,
    SqlStore, Tx,
};
use sqlx::postgres::PgPoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};
use sqlx::{Postgres, Sqlite};
use tokio::task::JoinSet;

use crate::cancel::at_every_await;
use crate::support::{Directory, PostgresServer, Proxy, RedisServer, wait_until};

const SOON: Duration = Duration::from_secs(30);
const TABLE: &str = "CREATE TABLE account (name TEXT PRIMARY KEY, cents BIGINT NOT NULL);
    INSERT INTO account VALUES ('alice', 100), ('bob', 100);";
const READ: &str = "SELECT cents FROM account WHERE name = 'alice'";
const SET: &str = "UPDATE account SET cents = $1 WHERE name = 'alice'";

pub struct Bench<DB: SqlDatabase> {
    pub redis: RedisServer,
    pub bank: SqlStore<DB>,
    pub coordinator: Coordinator,
    _server: Server,
}

#[allow(dead_code, reason = "they are kept")]
enum Server {
    Postgres(PostgresServer),
    Sqlite(Directory),
}

pub async fn postgres() -> Bench<Postgres> {
    let server = PostgresServer::start();
    let pool = PgPoolOptions::new().max_connections(10).connect(&server.url()).await.unwrap();
    let bank = SqlStore::new("bank", pool);
    bank.migrate().await.unwrap();
    sqlx::raw_sql(TABLE).execute(bank.pool()).await.unwrap();
    Bench::on(bank, Server::Postgres(server)).await
}

pub async fn sqlite() -> Bench<Sqlite> {
    let directory = Directory::new();
    let options = SqliteConnectOptions::new()
        .filename(directory.path().join("bank.db"))
        .journal_mode(SqliteJournalMode::Wal)
        .create_if_missing(true);
    let pool = SqlitePoolOptions::new().max_connections(10).connect_with(options).await.unwrap();
    let bank = SqlStore::new("bank", pool);
    bank.migrate().await.unwrap();
    sqlx::raw_sql(TABLE).execute(bank.pool()).await.unwrap();
    Bench::on(bank, Server::Sqlite(directory)).await
}

/// Locks that find out soon that the server is away.
async fn locks(port: u16) -> Locks {
    let reconnect_for = Duration::from_millis(300);
    let options = RedisOptions { reconnect_for, ..RedisOptions::default() };
    let url = format!("redis://127.0.0.1:{port}");
    let started = std::time::Instant::now();
    let backend = loop {
        // A busy machine needs longer for the first answer.
        match RedisBackend::connect(&url, options.clone()).await {
            Err(error) if error.is_unavailable() && started.elapsed() < SOON => {}
            answer => break answer.unwrap(),
        }
    };
    let mut options = LockOptions::default();
    options.call_timeout = Duration::from_secs(1);
    Locks::with_options(Arc::new(backend), options).await.unwrap()
}

impl<DB: SqlDatabase> Bench<DB> {
    async fn on(bank: SqlStore<DB>, server: Server) -> Self {
        let redis = RedisServer::start();
        let coordinator = Self::join(redis.port(), &bank).await;
        Self { redis, bank, coordinator, _server: server }
    }

    /// Another process, as it were.
    async fn join(redis: u16, bank: &SqlStore<DB>) -> Coordinator {
        Coordinator::builder(locks(redis).await)
            .store(bank)
            .wait(SOON)
            .fallback(Fallback::StoreFence)
            .build()
    }

    /// The lock service answers again.
    pub async fn returns(&self) {
        self.redis.restart_empty();
        let locks = self.coordinator.locks();
        let answers = async || locks.lock("probe").try_acquire().await.is_ok();
        wait_until("the lock service is back", SOON, answers).await;
    }
}

/// The same in both databases; the SQL is the same, and the types are not.
macro_rules! on_both {
    ($(async fn $name:ident($b:ident) $body:block)*) => {
        mod on_postgres { use super::*; $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() { let $b = postgres().await; $body }
        )* }
        mod on_sqlite { use super::*; $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() { let $b = sqlite().await; $body }
        )* }
    };
}

/// Adds one to what it has read, in a branch of `$tx`.
macro_rules! add_one {
    ($tx:expr, $b:expr) => {
        async {
            let db = $tx.enlist(&$b.bank).await?;
            let cents: i64 = sqlx::query_scalar(READ).fetch_one(&db).await?;
            tokio::task::yield_now().await;
            sqlx::query(SET).bind(cents + 1).execute(&db).await?;
            Ok::<_, Error>(())
        }
        .await
    };
}

macro_rules! cents {
    ($b:expr) => {
        sqlx::query_scalar::<_, i64>(READ).fetch_one($b.bank.pool()).await.unwrap()
    };
}

on_both! {
    async fn going_down_and_coming_back_needs_no_restart(b) {
        let request = b.coordinator.transaction(["alice"]).shared(["rates"]).stores([&b.bank]);
        let begin = || request.clone().begin();
        let tx = begin().await.unwrap();
        assert!(!tx.is_degraded() && tx.is_held());
        let before = tx.held()[0].token;
        add_one!(tx, b).unwrap();
        tx.commit().await.unwrap();

        b.redis.kill();
        for step in 1..=2 {
            let tx = begin().await.unwrap();
            assert!(tx.is_degraded() && tx.is_held());
            let tokens: Vec<_> = tx.held().iter().map(|held| held.token.get()).collect();
            assert_eq!(tokens, [before.get() + step; 2], "one above what the rows have seen");
            assert_eq!(tx.held()[1].mode, Mode::Shared);
            add_one!(tx, b).unwrap();
            tx.commit().await.unwrap();
        }
        let row = "SELECT write_token FROM palisade_fence WHERE resource = 'alice'";
        let row: i64 = sqlx::query_scalar(row).fetch_one(b.bank.pool()).await.unwrap();
        assert_eq!(u64::try_from(row).unwrap(), before.get() + 2);
        let failing = request.clone().fallback(Fallback::Fail);
        assert!(failing.begin().await.unwrap_err().is_unavailable(), "each may choose for itself");

        b.returns().await;
        let tx = begin().await.unwrap();
        assert!(!tx.is_degraded() && tx.held()[0].token.get() > before.get() + 2);
        add_one!(tx, b).unwrap();
        tx.commit().await.unwrap();
        assert_eq!(cents!(b), 104);
    }

    async fn without_a_declared_store_there_are_no_rows_to_take(b) {
        b.redis.kill();
        let error = b.coordinator.transaction(["alice"]).begin().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Degraded, "{error}");
        assert!(error.to_string().contains("store"), "{error}");
        assert!(std::error::Error::source(&error).is_some(), "why");
    }

    async fn one_that_reads_first_keeps_the_rows_until_it_writes(b) {
        b.redis.kill();
        let tx = b.coordinator.transaction(["alice"]).stores([&b.bank]).begin().await.unwrap();
        let seen: i64 = {
            let db = tx.read(&b.bank).await.unwrap();
            sqlx::query_scalar(READ).fetch_one(&db).await.unwrap()
        };
        let other = b.coordinator.transaction(["alice"]).stores([&b.bank]);
        let other = other.wait(Duration::from_millis(10)).begin().await.unwrap_err();
        assert_eq!(other.kind(), ErrorKind::Conflict, "{other}");
        {
            let db = tx.enlist(&b.bank).await.unwrap();
            sqlx::query(SET).bind(seen + 1).execute(&db).await.unwrap();
        }
        tx.commit().await.unwrap();
        assert_eq!(cents!(b), 101);

        let tx = b.coordinator.transaction([""; 0]).shared(["alice"]).stores([&b.bank]);
        let tx = tx.begin().await.unwrap();
        let db = tx.read(&b.bank).await.unwrap();
        sqlx::query(SET).bind(0_i64).execute(&db).await.unwrap_err();
        assert_eq!(tx.enlist(&b.bank).await.unwrap_err().kind(), ErrorKind::Misuse);
        tx.rollback().await.unwrap();
        assert_eq!(cents!(b), 101);
    }

    async fn a_transaction_that_began_before_the_cut_is_waited_for_at_its_rows(b) {
        let tx = b.coordinator.transaction(["alice"]).begin().await.unwrap();
        add_one!(tx, b).unwrap();
        b.redis.kill();
        let degraded = b.coordinator.transaction(["alice"]).stores([&b.bank]).begin();
        let (degraded, ()) = tokio::join!(degraded, async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            tx.commit().await.unwrap();
        });
        let degraded = degraded.unwrap();
        add_one!(degraded, b).unwrap();
        degraded.commit().await.unwrap();
        assert_eq!(cents!(b), 102);
    }

    async fn a_lock_whose_token_is_too_low_is_asked_for_again_above_the_floor(b) {
        let tx = b.coordinator.transaction(["alice"]).stores([&b.bank]).begin().await.unwrap();
        tx.commit().await.unwrap();
        let ahead = "UPDATE palisade_fence SET write_token = write_token + 3600000000";
        sqlx::raw_sql(ahead).execute(b.bank.pool()).await.unwrap();
        // Another process has no lock service, and nobody here knows of its token.
        let others = RedisServer::start();
        let other = Bench::join(others.port(), &b.bank).await;
        others.kill();
        let tx = other.transaction(["alice"]).stores([&b.bank]).begin().await.unwrap();
        assert!(tx.is_degraded());
        add_one!(tx, b).unwrap();
        tx.commit().await.unwrap();
        let error = b.coordinator.transaction(["alice"]).stores([&b.bank]).begin().await;
        let error = error.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StaleToken, "{error}");
        assert!(error.floor().is_some());
        let begun = AtomicU32::new(0);
        let work = async |tx: Tx| {
            begun.fetch_add(1, Ordering::Relaxed);
            assert!(!tx.is_degraded());
            add_one!(tx, b)
        };
        b.coordinator.run(["alice"], work).await.unwrap();
        assert_eq!(begun.load(Ordering::Relaxed), 2, "the first attempt was stale");
        assert_eq!(cents!(b), 102);
    }

    async fn a_nested_transaction_takes_the_rows_of_its_keys(b) {
        b.redis.kill();
        let tx = b.coordinator.transaction(["alice"]).stores([&b.bank]).begin();
        let mut tx = tx.await.unwrap();
        let nested = tx.nested(["bob", "alice", "bob"]).await.unwrap();
        add_one!(nested, b).unwrap();
        nested.rollback().await.unwrap();
        let held: Vec<_> = tx.held().iter().map(|held| held.key.to_string()).collect();
        assert_eq!(held, ["alice", "bob"]);
        let nested = tx.nested(["alice"]).await.unwrap();
        add_one!(nested, b).unwrap();
        nested.commit().await.unwrap();
        let token = i64::try_from(tx.held()[1].token.get()).unwrap();
        tx.commit().await.unwrap();
        let row = "SELECT write_token FROM palisade_fence WHERE resource = 'bob'";
        let row: i64 = sqlx::query_scalar(row).fetch_one(b.bank.pool()).await.unwrap();
        assert_eq!((cents!(b), row), (101, token), "undoing the work has kept the fence");
    }

    async fn nothing_is_lost_beside_those_who_still_have_their_locks(b) {
        let proxy = Proxy::start(b.redis.port()).await;
        let cut = Bench::join(proxy.port(), &b.bank).await;
        let (b, counts) = (Arc::new(b), Arc::new(Counts::default()));
        let mut tasks = JoinSet::new();
        for task in 0..6 {
            let is_cut = task % 2 == 0;
            let coordinator = if is_cut { cut.clone() } else { b.coordinator.clone() };
            let (b, counts) = (Arc::clone(&b), Arc::clone(&counts));
            tasks.spawn(async move {
                while !counts.ending.load(Ordering::Relaxed) {
                    let work = async |tx: Tx| {
                        add_one!(tx, b)?;
                        Ok::<_, Error>(tx.is_degraded())
                    };
                    let run = coordinator.transaction(["alice"]).stores([&b.bank]).run(work);
                    match run.await {
                        Ok(true) => counts.degraded.fetch_add(1, Ordering::Relaxed),
                        Ok(false) if is_cut => counts.back.fetch_add(1, Ordering::Relaxed),
                        Ok(false) => counts.others.fetch_add(1, Ordering::Relaxed),
                        Err(error) => {
                            assert!(!error.is_in_doubt(), "{error}");
                            println!("{error}");
                            0
                        }
                    };
                    // PostgreSQL lets who comes have a row before who was woken for it, so of two
                    // crowds that never rest one starves until its wait is over.
                    tokio::time::sleep(Duration::from_millis(fastrand::u64(10..40))).await;
                }
            });
        }
        for _ in 0..2 {
            counts.grow("those who are back", &counts.back).await;
            proxy.sever(true);
            let (degraded, others) = (&counts.degraded, &counts.others);
            tokio::join!(counts.grow("the degraded", degraded), counts.grow("the others", others));
            proxy.sever(false);
        }
        counts.grow("those who are back", &counts.back).await;
        counts.ending.store(true, Ordering::Relaxed);
        tokio::time::timeout(SOON * 2, tasks.join_all()).await.unwrap();
        println!("{counts:?}");
        let all = [&counts.degraded, &counts.back, &counts.others];
        let all: u32 = all.iter().map(|count| count.load(Ordering::Relaxed)).sum();
        assert_eq!(cents!(b), 100 + i64::from(all));
    }
}

/// What was committed: without the lock service, with it after it was back, and by those who were
/// never cut off.
#[derive(Debug, Default)]
struct Counts {
    degraded: AtomicU32,
    back: AtomicU32,
    others: AtomicU32,
    ending: AtomicBool,
}

impl Counts {
    /// Waits for some more of these.
    async fn grow(&self, whose: &str, count: &AtomicU32) {
        let enough = count.load(Ordering::Relaxed) + 2;
        let grown = async || count.load(Ordering::Relaxed) >= enough;
        wait_until(&format!("{whose} have done some more"), SOON * 2, grown).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_whose_rows_are_taken_are_declared_from_the_start_by_run() {
    let b = postgres().await;
    b.redis.kill();
    let other = b.coordinator.transaction(["bob"]).stores([&b.bank]).begin().await.unwrap();
    let other = std::sync::Mutex::new(Some(other));
    let begun = AtomicU32::new(0);
    let work = async |mut tx: Tx| {
        if begun.fetch_add(1, Ordering::Relaxed) == 1 {
            assert_eq!(tx.held().len(), 2, "both from the start");
        }
        let nested = match tx.nested(["bob"]).await {
            Ok(nested) => nested,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldDeadlock, "{error}");
                let other = other.lock().unwrap().take().unwrap();
                other.commit().await?;
                return Err(error);
            }
        };
        add_one!(nested, b)?;
        nested.commit().await
    };
    let request = b.coordinator.transaction(["alice"]).stores([&b.bank]);
    request.run(work).await.unwrap();
    assert_eq!((begun.load(Ordering::Relaxed), cents!(b)), (2, 101));
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_begin_commit_or_rollback_at_any_await_leaves_nothing() {
    let b = postgres().await;
    b.redis.kill();
    let attempt = || async {
        let request = b.coordinator.transaction(["alice", "bob"]).stores([&b.bank]);
        let tx = request.begin().await.unwrap();
        let db = tx.enlist(&b.bank).await.unwrap();
        sqlx::query(SET).bind(100_i64).execute(&db).await.unwrap();
        tx.commit().await.unwrap();
    };
    let clean = || async {
        b.coordinator.settled().await;
        let open = async || {
            let sql = "SELECT count(*) FROM pg_stat_activity
                 WHERE state LIKE 'idle in transaction%' OR application_name LIKE 'palisade%'";
            sqlx::query_scalar::<_, i64>(sql).fetch_one(b.bank.pool()).await.unwrap()
        };
        wait_until("nothing is left", SOON, async || open().await == 0).await;
    };
    assert!(at_every_await(attempt, clean).await > 0);
}

/// Whether tokens have risen, in the order in which they were granted.
async fn rises(grants: Vec<impl Future<Output = Result<u64>>>) {
    let mut last = 0;
    for grant in grants {
        let token = grant.await.unwrap();
        assert!(token > last, "{token} after {last}");
        last = token;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_lock_service_takes_over_and_gives_back_with_rising_tokens() {
    let (b, spare) = (postgres().await, RedisServer::start());
    let fallback = Fallback::backend(locks(spare.port()).await);
    let one = async |degraded: bool| {
        let request = b.coordinator.transaction(["alice"]).fallback(fallback.clone());
        let mut tx = request.begin().await?;
        assert_eq!((tx.is_degraded(), tx.is_held()), (degraded, true));
        add_one!(tx, b)?;
        // It stays with the service on which it began.
        drop(tx.nested(["alice", "bob"]).await?);
        let token = tx.held()[1].token.get();
        assert_eq!(tx.held().len(), 2);
        tx.commit().await?;
        Ok::<_, Error>(token)
    };
    rises(vec![one(false)]).await;
    // The one is an hour ahead of the other, so only the floor makes its tokens rise.
    let ahead = "UPDATE palisade_fence SET write_token = write_token + 3600000000";
    sqlx::raw_sql(ahead).execute(b.bank.pool()).await.unwrap();
    let work = async |tx: Tx| add_one!(tx, b);
    b.coordinator.run(["alice", "bob"], work).await.unwrap();
    let before = one(false).await.unwrap();
    b.redis.kill();
    let during = one(true).await.unwrap();
    assert!(during > before && one(true).await.unwrap() > during);
    b.returns().await;
    assert!(one(false).await.unwrap() > during);
    assert_eq!(cents!(b), 106);
}
