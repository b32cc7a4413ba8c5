//! Branches in PostgreSQL, without locks and transactions around them.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use palisade::store::{AnyBranch, Fence, Isolation, Outcome, Store};
use palisade::{Branch, Error, ErrorKind, Mode, SqlStore};
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::{AssertSqlSafe, Postgres};
use tokio::time::{Instant, timeout};

use crate::cancel::{at_every_await, drop_after};
use crate::store_fences::{
    again, commit, fence, held, in_doubt, rolled_back, share, with_lease, with_wait, write,
};
use crate::support::{Fault, PostgresServer, Proxy, wait_until};

const SOON: Duration = Duration::from_secs(10);

pub struct Bench {
    pub store: SqlStore<Postgres>,
    pub server: PostgresServer,
}

impl Bench {
    pub async fn new() -> Self {
        let server = PostgresServer::start();
        let store = SqlStore::new("bank", pool(server.port()).await);
        store.migrate().await.unwrap();
        let schema = "CREATE TABLE account (name TEXT PRIMARY KEY, cents BIGINT NOT NULL);
             INSERT INTO account VALUES ('alice', 100), ('bob', 100);
             CREATE TABLE nickname (name TEXT REFERENCES account DEFERRABLE INITIALLY DEFERRED);";
        sqlx::raw_sql(schema).execute(store.pool()).await.unwrap();
        Self { store, server }
    }

    async fn cents(&self, name: &'static str) -> i64 {
        let sql = "SELECT cents FROM account WHERE name = $1";
        sqlx::query_scalar(sql).bind(name).fetch_one(self.store.pool()).await.unwrap()
    }

    pub async fn open(&self, fence: &Fence) -> Arc<dyn AnyBranch> {
        self.store.open(fence).await.unwrap()
    }

    pub async fn refusal(&self, fence: &Fence) -> Error {
        self.store.open(fence).await.map(drop).unwrap_err()
    }

    pub async fn sql(&self, sql: &str) {
        let sql = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
        sql.execute(self.store.pool()).await.unwrap();
    }

    /// How many sessions have a transaction open, or are named after an attempt.
    async fn open_sessions(&self) -> i64 {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid()
             AND (state LIKE 'idle in transaction%' OR application_name LIKE 'palisade%')";
        sqlx::query_scalar(sql).fetch_one(self.store.pool()).await.unwrap()
    }

    /// No session has a transaction open, and every connection of the pool is usable.
    async fn assert_clean(&self) {
        wait_until("no transaction is open", SOON, async || self.open_sessions().await == 0).await;
        let mut connections = Vec::new();
        for _ in 0..4 {
            let acquired = timeout(SOON, self.store.pool().acquire()).await;
            connections.push(acquired.unwrap().unwrap());
        }
        for connection in &mut connections {
            let limits: (String, String) = sqlx::query_as(
                "SELECT current_setting('lock_timeout'),
                 current_setting('idle_in_transaction_session_timeout')",
            )
            .fetch_one(&mut **connection)
            .await
            .unwrap();
            assert_eq!(limits, ("0".to_owned(), "0".to_owned()));
        }
    }
}

async fn pool(port: u16) -> PgPool {
    pool_of(4, port).await
}

async fn pool_of(size: u32, port: u16) -> PgPool {
    let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
    let pool = PgPoolOptions::new().max_connections(size).acquire_timeout(Duration::from_secs(5));
    pool.connect(&url).await.unwrap()
}

pub fn db(branch: &Arc<dyn AnyBranch>) -> Branch<'_, Postgres> {
    Branch::on(branch).unwrap()
}

pub async fn add(branch: &Arc<dyn AnyBranch>, name: &str, cents: i64) -> Result<(), sqlx::Error> {
    let sql = "UPDATE account SET cents = cents + $1 WHERE name = $2";
    sqlx::query(sql).bind(cents).bind(name).execute(&db(branch)).await.map(drop)
}

#[tokio::test]
async fn a_branch_commits_what_was_done_behind_its_fence() {
    let b = Bench::new().await;
    let branch = b.open(&write("alice", 10)).await;
    add(&branch, "alice", 5).await.unwrap();
    let handle = db(&branch);
    let cents: (i64,) = sqlx::query_as("SELECT cents FROM account WHERE name = 'alice'")
        .fetch_one(&handle)
        .await
        .unwrap();
    assert_eq!(cents.0, 105);
    let names: Vec<String> = sqlx::query_scalar("SELECT name FROM account ORDER BY 1")
        .fetch(&handle)
        .map(Result::unwrap)
        .collect()
        .await;
    assert_eq!(names, ["alice", "bob"]);
    let none = sqlx::query("SELECT 1 FROM account WHERE name = 'x'").fetch_one(&handle).await;
    assert!(matches!(none.unwrap_err(), sqlx::Error::RowNotFound));
    commit(&branch).await;
    assert_eq!(b.cents("alice").await, 105);
    b.assert_clean().await;
}

#[tokio::test]
async fn opening_takes_one_round_trip_and_so_does_committing() {
    let b = Bench::new().await;
    let proxy = Proxy::start(b.server.port()).await;
    let options = PgPoolOptions::new().max_connections(1).test_before_acquire(false);
    let url = format!("postgres://postgres@127.0.0.1:{}/postgres", proxy.port());
    let store = SqlStore::new("bank", options.connect(&url).await.unwrap());
    // The pool pings a connection that came back, in the background.
    let idle = async || {
        wait_until("the connection is back", SOON, async || store.pool().num_idle() == 1).await;
        proxy.round_trips()
    };
    let mut counts = Vec::new();
    for token in 1..4 {
        let before = idle().await;
        let branch = store.open(&write("a", token)).await.unwrap();
        let opened = proxy.round_trips();
        commit(&branch).await;
        let committed = proxy.round_trips();
        counts.push((opened - before, committed - opened));
    }
    assert_eq!(counts[1..], [(1, 1), (1, 1)], "after the statements are prepared");
    let before = idle().await;
    let branch = store.open(&write("a", 10)).await.unwrap();
    let opened = proxy.round_trips();
    branch.rollback().await.unwrap();
    assert_eq!((opened - before, proxy.round_trips() - opened), (1, 1));
    for _ in 0..2 {
        idle().await;
        store.open_read(&share("a", 20)).await.unwrap().rollback().await.unwrap();
    }
    let before = idle().await;
    let branch = store.open_read(&share("a", 20)).await.unwrap();
    let opened = proxy.round_trips();
    branch.rollback().await.unwrap();
    assert_eq!((opened - before, proxy.round_trips() - opened), (3, 1));
}

#[tokio::test]
async fn a_stale_token_is_refused_with_its_key_and_the_stores_floor() {
    let b = Bench::new().await;
    let first = fence(vec![held("a", Mode::Exclusive, 20), held("b", Mode::Exclusive, 30)]);
    commit(&b.open(&first).await).await;
    let late = fence(vec![held("a", Mode::Exclusive, 25), held("b", Mode::Exclusive, 25)]);
    let error = b.refusal(&late).await;
    assert_eq!(error.kind(), ErrorKind::StaleToken);
    assert_eq!(error.key().unwrap().as_str(), "b");
    assert_eq!(error.floor().unwrap().get(), 30);
    commit(&b.open(&write("a", 21)).await).await;
    b.assert_clean().await;
}

#[tokio::test]
async fn keys_of_any_script_are_fenced_in_the_order_of_their_bytes() {
    let b = Bench::new().await;
    let odd = ["a\"b\\c", "{x}", "ключ", "NULL", "it's", "'; DROP TABLE account; --", "Z", "z"];
    let all =
        |token| fence(odd.iter().map(|key| held(key, Mode::Exclusive, token)).collect::<Vec<_>>());
    commit(&b.open(&all(7)).await).await;
    let seen: Vec<String> = sqlx::query_scalar("SELECT resource FROM palisade_fence ORDER BY ctid")
        .fetch_all(b.store.pool())
        .await
        .unwrap();
    let mut sorted = odd.map(str::to_owned);
    sorted.sort();
    assert_eq!(seen, sorted);
    assert_eq!(b.refusal(&all(6)).await.kind(), ErrorKind::StaleToken);
}

#[tokio::test]
async fn a_failed_statement_keeps_its_kind_for_whoever_starts_over() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    let raise = "DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$";
    sqlx::raw_sql(raise).execute(&db(&branch)).await.unwrap_err();
    assert_eq!(branch.failure().unwrap().kind(), ErrorKind::Conflict);
    let error = Error::from(add(&branch, "alice", 5).await.unwrap_err());
    assert_eq!(error.kind(), ErrorKind::Aborted);
    let error = rolled_back(branch.commit().await);
    assert_eq!(error.kind(), ErrorKind::Aborted);
    b.assert_clean().await;
}

#[tokio::test]
async fn a_cancelled_statement_is_ended_by_the_rollback_and_keeps_no_row() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    add(&branch, "alice", 5).await.unwrap();
    let handle = db(&branch);
    let slow = sqlx::query("SELECT pg_sleep(60)").execute(&handle);
    assert!(timeout(Duration::from_millis(100), slow).await.is_err());
    assert_eq!(branch.failure().unwrap().kind(), ErrorKind::Aborted);
    let started = Instant::now();
    branch.rollback().await.unwrap();
    assert!(started.elapsed() < SOON);
    b.assert_clean().await;
    let next = b.open(&write("a", 11)).await;
    add(&next, "alice", 1).await.unwrap();
    commit(&next).await;
    assert_eq!(b.cents("alice").await, 101);
}

#[tokio::test]
async fn a_statement_is_ended_by_the_stores_own_time_out() {
    let b = Bench::new().await;
    let store = b.store.clone().statement_timeout(Duration::from_millis(50));
    let branch = store.open(&write("a", 10)).await.unwrap();
    let error = sqlx::query("SELECT pg_sleep(60)").execute(&db(&branch)).await.unwrap_err();
    assert_eq!(error.as_database_error().unwrap().code().as_deref(), Some("57014"));
    branch.rollback().await.unwrap();
    b.assert_clean().await;
}

#[tokio::test]
async fn an_open_stream_refuses_other_statements_and_can_be_left_half_read() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    let handle = db(&branch);
    let mut names = sqlx::query("SELECT name FROM account").fetch(&handle);
    names.next().await.unwrap().unwrap();
    let error = Error::from(add(&branch, "alice", 5).await.unwrap_err());
    assert_eq!(error.kind(), ErrorKind::Misuse);
    drop(names);
    assert!(branch.failure().is_none());
    add(&branch, "alice", 5).await.unwrap();
    let mut slow = sqlx::query("SELECT pg_sleep(0.2)").fetch(&handle);
    drop_after(slow.next(), 0).await;
    drop(slow);
    assert_eq!(branch.failure().unwrap().kind(), ErrorKind::Aborted);
    branch.rollback().await.unwrap();
    b.assert_clean().await;
}

#[tokio::test]
async fn an_error_behind_the_first_row_of_a_dropped_stream_is_not_committed_over() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    add(&branch, "alice", 5).await.unwrap();
    let handle = db(&branch);
    let sql = "SELECT 1 / (3 - i) FROM generate_series(1, 3) AS i";
    let mut rows = sqlx::query(sql).fetch(&handle);
    rows.next().await.unwrap().unwrap();
    drop(rows);
    let outcome = branch.commit().await;
    assert!(matches!(outcome, Outcome::RolledBack(_)), "{outcome:?}");
    assert_eq!(b.cents("alice").await, 100);
    b.assert_clean().await;
}

#[tokio::test]
async fn a_savepoint_clears_the_failure_within_it() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    add(&branch, "alice", 1).await.unwrap();
    branch.savepoint(1).await.unwrap();
    add(&branch, "alice", 10).await.unwrap();
    let insert = "INSERT INTO account VALUES ('alice', 1)";
    sqlx::query(insert).execute(&db(&branch)).await.unwrap_err();
    branch.rollback_to_savepoint(1).await.unwrap();
    branch.savepoint(1).await.unwrap();
    let handle = db(&branch);
    let slow = sqlx::query("SELECT pg_sleep(0.5)").execute(&handle);
    assert!(timeout(Duration::from_millis(100), slow).await.is_err());
    branch.abandon_savepoint(1);
    add(&branch, "alice", 100).await.unwrap();
    branch.savepoint(1).await.unwrap();
    add(&branch, "alice", 1000).await.unwrap();
    branch.release_savepoint(1).await.unwrap();
    commit(&branch).await;
    assert_eq!(b.cents("alice").await, 1201);
    b.assert_clean().await;
}

#[tokio::test]
async fn a_savepoint_dropped_at_any_await_is_undone_with_itself() {
    let mut b = Bench::new().await;
    let proxy = Proxy::start(b.server.port()).await;
    b.store = SqlStore::new("bank", pool(proxy.port()).await);
    let branch = b.open(&write("a", 10)).await;
    let undone = || async {
        branch.abandon_savepoint(1);
        add(&branch, "alice", 1).await.unwrap();
    };
    assert!(at_every_await(|| branch.savepoint(1), undone).await > 0);
    commit(&branch).await;
}

#[tokio::test]
async fn a_lost_lease_refuses_every_statement_and_the_commit() {
    let b = Bench::new().await;
    let fence = write("a", 10);
    let branch = b.open(&fence).await;
    add(&branch, "alice", 5).await.unwrap();
    fence.state.lose();
    let error = Error::from(add(&branch, "alice", 5).await.unwrap_err());
    assert_eq!(error.kind(), ErrorKind::LeaseLost);
    assert_eq!(rolled_back(branch.commit().await).kind(), ErrorKind::LeaseLost);
    assert_eq!(b.cents("alice").await, 100);
    b.assert_clean().await;
}

#[tokio::test]
async fn a_constraint_that_is_checked_at_commit_is_a_rollback() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    sqlx::query("INSERT INTO nickname VALUES ('nobody')").execute(&db(&branch)).await.unwrap();
    let error = rolled_back(branch.commit().await);
    assert_eq!(error.kind(), ErrorKind::Store);
    let source = std::error::Error::source(&error).unwrap();
    assert!(source.to_string().contains("nickname"), "{source}");
    b.assert_clean().await;
}

#[tokio::test]
async fn a_serialization_failure_at_commit_is_a_conflict() {
    let b = Bench::new().await;
    let store = b.store.clone().isolation(Isolation::Serializable);
    // Write skew between transactions that share no key: each reads what the other writes.
    let [first, second] = [write("a", 10), write("b", 10)];
    let (first, second) = (store.open(&first).await.unwrap(), store.open(&second).await.unwrap());
    for branch in [&first, &second] {
        let sum = "SELECT sum(cents) FROM account";
        sqlx::query(sum).fetch_one(&db(branch)).await.unwrap();
    }
    add(&first, "alice", 1).await.unwrap();
    add(&second, "bob", 1).await.unwrap();
    commit(&first).await;
    let error = match second.failure() {
        Some(_) => unreachable!("the statement itself was let through"),
        None => rolled_back(second.commit().await),
    };
    assert_eq!(error.kind(), ErrorKind::Conflict);
    b.assert_clean().await;
}

#[tokio::test]
async fn serializable_branches_with_different_keys_do_not_disturb_each_other() {
    let b = Bench::new().await;
    let store = b.store.clone().isolation(Isolation::Serializable);
    let fences = [write("a", 10), write("b", 10), write("c", 10)];
    let mut branches = Vec::new();
    for fence in &fences {
        branches.push(store.open(fence).await.unwrap());
    }
    for branch in &branches {
        commit(branch).await;
    }
}

#[tokio::test]
async fn a_lost_reply_to_commit_is_settled_as_committed() {
    let b = Bench::new().await;
    let proxy = Proxy::start(b.server.port()).await;
    let store = SqlStore::new("bank", pool(proxy.port()).await);
    let branch = store.open(&write("a", 10)).await.unwrap();
    add(&branch, "alice", 5).await.unwrap();
    proxy.plan("COMMIT\0", Fault::LoseReply);
    commit(&branch).await;
    assert_eq!(b.cents("alice").await, 105);
}

#[tokio::test]
async fn a_commit_that_never_arrived_is_settled_as_rolled_back_and_its_session_ended() {
    let b = Bench::new().await;
    let proxy = Proxy::start(b.server.port()).await;
    // One connection: the one that is closed makes room for the one that settles.
    let store = SqlStore::new("bank", pool_of(1, proxy.port()).await);
    for (token, fresh) in [(10, true), (20, false)] {
        let branch = store.open(&write("a", token)).await.unwrap();
        add(&branch, "alice", 5).await.unwrap();
        proxy.plan("COMMIT\0", Fault::LoseRequest);
        let error = rolled_back(branch.commit().await);
        assert_eq!(error.kind(), ErrorKind::Unavailable, "fresh row: {fresh}, {error:?}");
        assert!(error.transaction().is_some());
        assert_eq!(b.cents("alice").await, 100);
        assert_eq!(b.open_sessions().await, 0, "the old session was ended");
        commit(&b.open(&write("a", token + 5)).await).await;
    }
}

#[tokio::test]
async fn a_lost_reply_after_which_others_wrote_is_in_doubt() {
    let b = Bench::new().await;
    let proxy = Proxy::start(b.server.port()).await;
    let store = SqlStore::new("bank", pool(proxy.port()).await);
    let fence = with_lease(write("a", 10), Duration::from_secs(5));
    let branch = store.open(&fence).await.unwrap();
    proxy.refuse(true);
    proxy.plan("COMMIT\0", Fault::LoseReply);
    let (outcome, ()) = tokio::join!(branch.commit(), async {
        proxy.happened().await;
        commit(&b.open(&write("a", 11)).await).await;
        proxy.refuse(false);
    });
    let error = in_doubt(outcome);
    assert_eq!(error.transaction(), Some(fence.attempt));
    assert!(std::error::Error::source(&error).is_some());
}

#[tokio::test]
async fn a_lost_reply_of_a_store_that_stays_away_is_in_doubt_after_a_lease() {
    let b = Bench::new().await;
    let proxy = Proxy::start(b.server.port()).await;
    let store = SqlStore::new("bank", pool(proxy.port()).await);
    let fence = with_lease(write("a", 10), Duration::from_millis(300));
    let branch = store.open(&fence).await.unwrap();
    proxy.refuse(true);
    proxy.plan("COMMIT\0", Fault::LoseReply);
    let started = Instant::now();
    let error = in_doubt(branch.commit().await);
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(error.transaction(), Some(fence.attempt));
}

#[tokio::test]
async fn a_lost_reply_whose_row_was_purged_is_in_doubt() {
    let b = Bench::new().await;
    let proxy = Proxy::start(b.server.port()).await;
    let store = SqlStore::new("bank", pool(proxy.port()).await);
    let branch = store.open(&write("a", 10)).await.unwrap();
    proxy.refuse(true);
    proxy.plan("COMMIT\0", Fault::LoseReply);
    let (outcome, ()) = tokio::join!(branch.commit(), async {
        proxy.happened().await;
        b.sql("UPDATE palisade_watermark SET mark = 10; DELETE FROM palisade_fence").await;
        proxy.refuse(false);
    });
    in_doubt(outcome);
}

#[tokio::test]
async fn a_server_that_dies_before_the_commit_is_a_rollback_and_after_it_a_commit() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    add(&branch, "alice", 5).await.unwrap();
    b.server.kill();
    let (outcome, ()) = tokio::join!(branch.commit(), async {
        b.server.restart();
    });
    assert_eq!(rolled_back(outcome).kind(), ErrorKind::Unavailable);
    assert_eq!(b.cents("alice").await, 100);

    let proxy = Proxy::start(b.server.port()).await;
    let store = SqlStore::new("bank", pool(proxy.port()).await);
    let branch = store.open(&write("a", 20)).await.unwrap();
    add(&branch, "alice", 5).await.unwrap();
    proxy.plan("COMMIT\0", Fault::LoseReply);
    let (outcome, ()) = tokio::join!(branch.commit(), async {
        proxy.happened().await;
        b.server.kill();
        b.server.restart();
    });
    assert!(matches!(outcome, Outcome::Committed), "{outcome:?}");
    assert_eq!(b.cents("alice").await, 105);
}

#[tokio::test]
async fn a_future_dropped_at_any_await_leaves_the_pool_clean() {
    let mut b = Bench::new().await;
    // Replies come through a task of this runtime, so none is there before the future is left.
    let proxy = Proxy::start(b.server.port()).await;
    b.store = SqlStore::new("bank", pool(proxy.port()).await);
    let tokens = std::cell::Cell::new(100);
    let next = || {
        tokens.set(tokens.get() + 1);
        write("a", tokens.get())
    };
    let open = || async { b.store.open(&next()).await.map(drop).unwrap() };
    let awaits = at_every_await(open, || b.assert_clean()).await;
    assert!(awaits > 2, "{awaits}");
    let read = || async { b.store.open_read(&next()).await.map(drop).unwrap() };
    let awaits = at_every_await(read, || b.assert_clean()).await;
    assert!(awaits > 4, "{awaits}");
    for commits in [true, false] {
        for n in 0.. {
            let branch = b.open(&next()).await;
            add(&branch, "alice", 1).await.unwrap();
            let finished = match commits {
                true => drop_after(branch.commit(), n).await,
                false => drop_after(branch.rollback(), n).await,
            };
            drop(branch);
            b.assert_clean().await;
            if finished {
                assert!(n > 0);
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_fence_that_was_dropped_while_it_waited_leaves_no_session_behind() {
    let b = Bench::new().await;
    let holder = b.open(&write("a", 20)).await;
    let fence = with_wait(write("a", 10), Duration::from_secs(30));
    assert!(timeout(Duration::from_millis(400), b.store.open(&fence)).await.is_err());
    commit(&holder).await;
    b.assert_clean().await;
}

#[tokio::test]
async fn migrations_run_twice_at_once_and_beside_the_programs_own() {
    let server = PostgresServer::start();
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("1_own.sql"), "CREATE TABLE own (id INT)").unwrap();
    let migrator = sqlx::migrate::Migrator::new(directory.path()).await.unwrap();
    let mut stores = Vec::new();
    for _ in 0..4 {
        stores.push(SqlStore::new("bank", pool(server.port()).await));
    }
    let own = migrator.run(stores[0].pool());
    let runs = futures_util::future::join_all(stores.iter().map(SqlStore::migrate));
    let (own, runs) = tokio::join!(own, runs);
    own.unwrap();
    for run in runs {
        run.unwrap();
    }
    migrator.run(stores[0].pool()).await.unwrap();
    stores[0].migrate().await.unwrap();
    let ids = futures_util::future::join_all(stores.iter().map(Store::id)).await;
    assert!(ids.iter().all(|id| id.as_ref().unwrap() == ids[0].as_ref().unwrap()));
}

#[tokio::test]
async fn a_migration_that_was_cancelled_leaves_no_lock() {
    let server = PostgresServer::start();
    let store = SqlStore::new("bank", pool(server.port()).await);
    for n in 0.. {
        let finished = drop_after(store.migrate(), n).await;
        if finished {
            break;
        }
    }
    timeout(SOON, store.migrate()).await.unwrap().unwrap();
    commit(&store.open(&write("a", 1)).await.unwrap()).await;
}

#[tokio::test]
async fn a_database_without_the_tables_and_a_role_without_rights_say_so() {
    let b = Bench::new().await;
    let url = b.server.create_database("empty");
    let store = SqlStore::new("empty", PgPoolOptions::new().connect(&url).await.unwrap());
    let error = store.open(&write("a", 1)).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotMigrated);
    assert!(error.to_string().contains("migrate()"), "{error}");
    b.sql("CREATE ROLE guest LOGIN").await;
    let url = format!("postgres://guest@127.0.0.1:{}/postgres", b.server.port());
    let store = SqlStore::new("bank", PgPoolOptions::new().connect(&url).await.unwrap());
    let error = store.open(&write("a", 1)).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
}

#[tokio::test]
async fn a_branch_whose_session_is_gone_says_so_and_rolls_back() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
         WHERE application_name LIKE 'palisade:%'";
    b.sql(end).await;
    let gone = async || b.open_sessions().await == 0;
    wait_until("its session is gone", SOON, gone).await;
    let error = Error::from(add(&branch, "alice", 5).await.unwrap_err());
    assert_eq!(error.kind(), ErrorKind::Conflict, "it may start over: {error:?}");
    assert_eq!(branch.failure().unwrap().kind(), ErrorKind::Conflict);
    rolled_back(branch.commit().await);
    b.assert_clean().await;
    assert!(matches!(branch.commit().await, Outcome::RolledBack(_)));
    let mine = write("a", 11);
    commit(&b.open(&mine).await).await;
    commit(&b.open(&again(&mine)).await).await;
}

#[tokio::test]
async fn a_branch_whose_opening_was_cancelled_can_be_opened_again_by_its_owner() {
    let b = Bench::new().await;
    let mine = write("a", 10);
    for n in 0..10 {
        drop_after(b.store.open(&mine), n).await;
        b.open(&mine).await.rollback().await.unwrap();
    }
    b.assert_clean().await;
}
