//! Branches in a SQLite file, without locks and transactions around them.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use palisade::store::{AnyBranch, Store};
use palisade::{Branch, Error, ErrorKind, Mode, SqlStore};
use sqlx::Sqlite;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions};
use tempfile::TempDir;
use tokio::time::{Instant, timeout};

use crate::cancel::{at_every_await, drop_after};
use crate::store_fences::{
    again, commit, fence, held, in_doubt, rolled_back, share, with_wait, write,
};

type Result<T, E = sqlx::Error> = std::result::Result<T, E>;

struct Bench {
    store: SqlStore<Sqlite>,
    directory: TempDir,
}

impl Bench {
    async fn new() -> Self {
        Self::with(SqliteJournalMode::Wal).await
    }

    async fn with(mode: SqliteJournalMode) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = SqlStore::new("bank", open(&directory, mode).await);
        store.migrate().await.unwrap();
        let schema = "CREATE TABLE account (name TEXT PRIMARY KEY, cents INTEGER NOT NULL);
             INSERT INTO account VALUES ('alice', 100), ('bob', 100);";
        sqlx::raw_sql(schema).execute(store.pool()).await.unwrap();
        Self { store, directory }
    }

    /// The same file through another pool, as another process would open it.
    async fn elsewhere(&self) -> SqlStore<Sqlite> {
        SqlStore::new("bank", open(&self.directory, SqliteJournalMode::Wal).await)
    }

    async fn cents(&self, name: &'static str) -> i64 {
        let sql = "SELECT cents FROM account WHERE name = ?";
        sqlx::query_scalar(sql).bind(name).fetch_one(self.store.pool()).await.unwrap()
    }

    async fn open(&self, fence: &palisade::store::Fence) -> Arc<dyn AnyBranch> {
        self.store.open(fence).await.unwrap()
    }

    async fn refusal(&self, fence: &palisade::store::Fence) -> Error {
        self.store.open(fence).await.map(drop).unwrap_err()
    }

    /// No connection of the pool has a transaction open or a setting of ours.
    async fn assert_clean(&self) {
        let mut connections = Vec::new();
        for _ in 0..4 {
            let acquired = timeout(Duration::from_secs(5), self.store.pool().acquire()).await;
            connections.push(acquired.unwrap().unwrap());
        }
        for connection in &mut connections {
            sqlx::raw_sql("BEGIN IMMEDIATE; ROLLBACK").execute(&mut **connection).await.unwrap();
            let busy: i64 = sqlx::query_scalar("PRAGMA busy_timeout")
                .fetch_one(&mut **connection)
                .await
                .unwrap();
            assert_eq!(busy, 3_000);
            let query_only: i64 =
                sqlx::query_scalar("PRAGMA query_only").fetch_one(&mut **connection).await.unwrap();
            assert_eq!(query_only, 0);
        }
    }
}

async fn open(directory: &TempDir, mode: SqliteJournalMode) -> SqlitePool {
    let options = SqliteConnectOptions::new()
        .filename(directory.path().join("bank.db"))
        .journal_mode(mode)
        .busy_timeout(Duration::from_secs(3))
        .foreign_keys(true)
        .create_if_missing(true);
    let pool = SqlitePoolOptions::new().max_connections(4);
    pool.acquire_timeout(Duration::from_secs(2)).connect_with(options).await.unwrap()
}

fn db(branch: &Arc<dyn AnyBranch>) -> Branch<'_, Sqlite> {
    Branch::on(branch).unwrap()
}

/// Takes long enough to be cancelled while it runs.
async fn add_slowly(branch: &Arc<dyn AnyBranch>) -> Result<()> {
    let sql = "UPDATE account SET cents = cents + (
             WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 200000)
             SELECT count(*) FROM n)";
    sqlx::query(sql).execute(&db(branch)).await.map(drop)
}

async fn add(branch: &Arc<dyn AnyBranch>, name: &str, cents: i64) -> Result<()> {
    let sql = "UPDATE account SET cents = cents + ? WHERE name = ?";
    sqlx::query(sql).bind(cents).bind(name).execute(&db(branch)).await.map(drop)
}

#[tokio::test]
async fn a_branch_commits_what_was_done_behind_its_fence() {
    let b = Bench::new().await;
    let branch = b.open(&write("alice", 10)).await;
    add(&branch, "alice", 5).await.unwrap();
    let db = db(&branch);
    let cents: (i64,) = sqlx::query_as("SELECT cents FROM account WHERE name = 'alice'")
        .fetch_one(&db)
        .await
        .unwrap();
    assert_eq!(cents.0, 105);
    let none = sqlx::query("SELECT 1 FROM account WHERE name = 'carol'").fetch_optional(&db).await;
    assert!(none.unwrap().is_none());
    let all: Vec<(String,)> =
        sqlx::query_as("SELECT name FROM account").fetch_all(&db).await.unwrap();
    assert_eq!(all.len(), 2);
    let missing = sqlx::query("SELECT 1 FROM account WHERE name = 'carol'").fetch_one(&db).await;
    assert!(matches!(missing.unwrap_err(), sqlx::Error::RowNotFound));
    assert!(branch.failure().is_none(), "to find no row is no failure");
    commit(&branch).await;
    assert_eq!(b.cents("alice").await, 105);
    b.assert_clean().await;
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
async fn a_duplicate_token_of_another_owner_is_refused() {
    let b = Bench::new().await;
    let mine = write("a", 20);
    commit(&b.open(&mine).await).await;
    assert_eq!(b.refusal(&write("a", 20)).await.kind(), ErrorKind::StaleToken);
    commit(&b.open(&again(&mine)).await).await;
}

#[tokio::test]
async fn a_shared_token_refuses_writers_below_it_and_passes_beside_others() {
    let b = Bench::new().await;
    let reading = fence(vec![held("a", Mode::Exclusive, 20), held("rates", Mode::Shared, 20)]);
    commit(&b.open(&reading).await).await;
    let older = fence(vec![held("b", Mode::Exclusive, 15), held("rates", Mode::Shared, 15)]);
    commit(&b.open(&older).await).await;
    assert_eq!(b.refusal(&write("rates", 20)).await.kind(), ErrorKind::StaleToken);
    assert_eq!(b.refusal(&write("rates", 15)).await.floor().unwrap().get(), 20);
    commit(&b.open(&write("rates", 21)).await).await;
    let late = fence(vec![held("c", Mode::Exclusive, 21), held("rates", Mode::Shared, 20)]);
    assert_eq!(b.refusal(&late).await.key().unwrap().as_str(), "rates");
}

#[tokio::test]
async fn a_branch_needs_a_key_and_to_write_an_exclusive_one() {
    let b = Bench::new().await;
    assert_eq!(b.refusal(&fence(Vec::new())).await.kind(), ErrorKind::Misuse);
    let error = b.refusal(&share("a", 1)).await;
    assert_eq!(error.kind(), ErrorKind::Misuse);
    assert!(error.to_string().contains("use read"), "{error}");
}

#[tokio::test]
async fn keys_of_any_script_are_fenced_as_they_are() {
    let b = Bench::new().await;
    let odd = ["a\"b\\c", "{x}", "ключ", "two words", "line\nbreak", "'; DROP TABLE account; --"];
    let all =
        |token| fence(odd.iter().map(|key| held(key, Mode::Exclusive, token)).collect::<Vec<_>>());
    commit(&b.open(&all(7)).await).await;
    let mut seen: Vec<String> = sqlx::query_scalar("SELECT resource FROM palisade_fence")
        .fetch_all(b.store.pool())
        .await
        .unwrap();
    seen.sort();
    let mut odd = odd.map(str::to_owned);
    odd.sort();
    assert_eq!(seen, odd);
    assert_eq!(b.refusal(&all(6)).await.kind(), ErrorKind::StaleToken);
}

#[tokio::test]
async fn a_users_own_commit_through_the_branch_is_found_out() {
    let b = Bench::new().await;
    for sql in ["COMMIT", "ROLLBACK", "COMMIT; BEGIN IMMEDIATE"] {
        let own = write("a", 10);
        let branch = b.open(&again(&own)).await;
        sqlx::raw_sql(sql).execute(&db(&branch)).await.unwrap();
        let _ = add(&branch, "alice", 1).await;
        let error = in_doubt(branch.commit().await);
        assert!(error.transaction().is_some());
        b.assert_clean().await;
        let branch = b.open(&write("a", 10_000 + b.cents("alice").await.unsigned_abs())).await;
        sqlx::raw_sql(sql).execute(&db(&branch)).await.unwrap();
        assert!(branch.rollback().await.unwrap_err().is_in_doubt());
        b.assert_clean().await;
        sqlx::query("DELETE FROM palisade_fence").execute(b.store.pool()).await.unwrap();
    }
}

#[tokio::test]
async fn after_a_failed_statement_a_branch_can_only_roll_back() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    add(&branch, "alice", 5).await.unwrap();
    sqlx::query("INSERT INTO account VALUES ('alice', 1)").execute(&db(&branch)).await.unwrap_err();
    let error = Error::from(add(&branch, "alice", 5).await.unwrap_err());
    assert_eq!(error.kind(), ErrorKind::Aborted);
    assert_eq!(branch.failure().unwrap().kind(), ErrorKind::Store);
    let error = rolled_back(branch.commit().await);
    assert_eq!(error.kind(), ErrorKind::Aborted);
    let cause = std::error::Error::source(&error).unwrap();
    assert!(std::error::Error::source(cause).unwrap().to_string().contains("UNIQUE"), "{cause}");
    assert_eq!(b.cents("alice").await, 100);
    b.assert_clean().await;
}

#[tokio::test]
async fn a_cancelled_statement_leaves_a_branch_that_can_only_roll_back() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    assert!(!drop_after(add_slowly(&branch), 0).await);
    assert_eq!(branch.failure().unwrap().kind(), ErrorKind::Aborted);
    let error = rolled_back(branch.commit().await);
    assert_eq!(error.kind(), ErrorKind::Aborted);
    assert_eq!(b.cents("alice").await, 100);
    b.assert_clean().await;
}

#[tokio::test]
async fn a_statement_beside_an_open_stream_fails_at_once_and_says_why() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    let handle = db(&branch);
    let mut names = sqlx::query("SELECT name FROM account").fetch(&handle);
    assert!(names.next().await.unwrap().is_ok());
    let started = Instant::now();
    let error = Error::from(add(&branch, "alice", 5).await.unwrap_err());
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(error.kind(), ErrorKind::Misuse);
    assert!(error.to_string().contains("stream"), "{error}");
    let error = rolled_back(b_commit_while_streaming(&branch).await);
    assert_eq!(error.kind(), ErrorKind::Misuse);
    drop(names);
    drop(handle);
    drop(branch);
    b.assert_clean().await;
}

async fn b_commit_while_streaming(branch: &Arc<dyn AnyBranch>) -> palisade::store::Outcome {
    timeout(Duration::from_secs(1), branch.commit()).await.unwrap()
}

#[tokio::test]
async fn a_stream_may_be_dropped_after_its_first_item_but_not_before() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    let handle = db(&branch);
    let mut names = sqlx::query("SELECT name FROM account").fetch(&handle);
    names.next().await.unwrap().unwrap();
    drop(names);
    assert!(branch.failure().is_none());
    add(&branch, "alice", 5).await.unwrap();
    let whole: Vec<_> = sqlx::query("SELECT name FROM account").fetch(&handle).collect().await;
    assert_eq!(whole.len(), 2);
    let slow = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 200000)
                SELECT count(*) FROM n";
    let mut numbers = sqlx::query(slow).fetch(&handle);
    drop_after(numbers.next(), 0).await;
    drop(numbers);
    assert_eq!(branch.failure().unwrap().kind(), ErrorKind::Aborted);
    branch.rollback().await.unwrap();
    b.assert_clean().await;
}

#[tokio::test]
async fn statements_side_by_side_stand_in_line() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    let adds = (0..20).map(|_| add(&branch, "alice", 1));
    for result in futures_util::future::join_all(adds).await {
        result.unwrap();
    }
    commit(&branch).await;
    assert_eq!(b.cents("alice").await, 120);
}

#[tokio::test]
async fn a_savepoint_undoes_what_came_since_and_clears_its_failure() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    add(&branch, "alice", 1).await.unwrap();
    branch.savepoint(1).await.unwrap();
    add(&branch, "alice", 10).await.unwrap();
    branch.savepoint(2).await.unwrap();
    sqlx::query("INSERT INTO account VALUES ('alice', 1)").execute(&db(&branch)).await.unwrap_err();
    assert!(branch.failure().is_some());
    branch.rollback_to_savepoint(2).await.unwrap();
    assert!(branch.failure().is_none());
    branch.release_savepoint(1).await.unwrap();
    branch.savepoint(1).await.unwrap();
    add(&branch, "alice", 1000).await.unwrap();
    branch.abandon_savepoint(1);
    add(&branch, "alice", 100).await.unwrap();
    commit(&branch).await;
    assert_eq!(b.cents("alice").await, 211);
    b.assert_clean().await;
}

#[tokio::test]
async fn an_abandoned_savepoint_is_undone_even_by_the_commit() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    add(&branch, "alice", 1).await.unwrap();
    branch.savepoint(1).await.unwrap();
    assert!(!drop_after(add_slowly(&branch), 0).await);
    branch.abandon_savepoint(1);
    assert!(branch.failure().is_none(), "it goes with the savepoint");
    commit(&branch).await;
    assert_eq!(b.cents("alice").await, 101);
}

#[tokio::test]
async fn a_savepoint_dropped_at_any_await_is_undone_with_itself() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    let n = at_every_await(
        || branch.savepoint(1),
        || async {
            branch.abandon_savepoint(1);
            add(&branch, "alice", 1).await.unwrap();
        },
    )
    .await;
    assert!(n < 10);
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
    assert_eq!(b.refusal(&fence).await.kind(), ErrorKind::LeaseLost);
    assert_eq!(b.cents("alice").await, 100);
    b.assert_clean().await;
}

#[tokio::test]
async fn a_closed_branch_refuses_statements_and_can_still_roll_back() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    branch.close();
    let error = Error::from(add(&branch, "alice", 5).await.unwrap_err());
    assert_eq!(error.kind(), ErrorKind::Misuse);
    branch.rollback().await.unwrap();
    branch.rollback().await.unwrap();
    b.assert_clean().await;
}

#[tokio::test]
async fn a_foreign_process_is_waited_for_until_the_deadline() {
    let b = Bench::new().await;
    let other = b.elsewhere().await;
    let theirs = other.open(&write("b", 10)).await.unwrap();
    let error = b.refusal(&with_wait(write("a", 10), Duration::from_millis(200))).await;
    assert_eq!(error.kind(), ErrorKind::Conflict);
    let fence = write("a", 10);
    let (mine, ()) = tokio::join!(b.open(&fence), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        commit(&theirs).await;
    });
    commit(&mine).await;
    b.assert_clean().await;
}

#[tokio::test]
async fn a_commit_waits_for_readers_of_a_file_without_wal() {
    let b = Bench::with(SqliteJournalMode::Delete).await;
    let pool = open(&b.directory, SqliteJournalMode::Delete).await;
    let mut reader = pool.begin().await.unwrap();
    sqlx::query("SELECT * FROM account").fetch_all(&mut *reader).await.unwrap();
    let branch = b.open(&write("a", 10)).await;
    add(&branch, "alice", 5).await.unwrap();
    let ((), ()) = tokio::join!(commit(&branch), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        reader.rollback().await.unwrap();
    });
    assert_eq!(b.cents("alice").await, 105);
    b.assert_clean().await;
}

#[tokio::test]
async fn an_owner_that_would_wait_for_itself_is_told_at_once() {
    let b = Bench::new().await;
    let mine = write("a", 10);
    let branch = b.open(&mine).await;
    let started = Instant::now();
    assert_eq!(b.refusal(&again(&mine)).await.kind(), ErrorKind::Misuse);
    assert!(started.elapsed() < Duration::from_secs(1));
    branch.rollback().await.unwrap();
    commit(&b.open(&again(&mine)).await).await;
}

#[tokio::test]
async fn a_reading_branch_reads_one_snapshot_and_does_not_stand_in_line() {
    let b = Bench::new().await;
    let both = [b.store.open_read(&share("a", 10)).await, b.store.open_read(&share("a", 12)).await];
    let [first, second] = both.map(Result::unwrap);
    let writer = b.open(&write("b", 20)).await;
    add(&writer, "alice", 5).await.unwrap();
    commit(&writer).await;
    for branch in [&first, &second] {
        assert!(branch.is_read_only());
        let sql = "SELECT cents FROM account WHERE name = 'alice'";
        let cents: i64 = sqlx::query_scalar(sql).fetch_one(&db(branch)).await.unwrap();
        assert_eq!(cents, 100, "as it was when the snapshot was taken");
    }
    assert!(add(&first, "alice", 5).await.is_err(), "it cannot write");
    first.rollback().await.unwrap();
    commit(&second).await;
    b.assert_clean().await;
    assert_eq!(b.refusal(&write("a", 11)).await.floor().unwrap().get(), 12);
}

#[tokio::test]
async fn a_reading_branch_that_was_overtaken_is_refused_and_one_that_reads_its_own_passes() {
    let b = Bench::new().await;
    let mine = write("a", 20);
    let first = b.store.open_read(&mine).await.unwrap();
    commit(&first).await;
    commit(&b.open(&again(&mine)).await).await;
    let second = b.store.open_read(&again(&mine)).await.unwrap();
    second.rollback().await.unwrap();
    for stale in [write("a", 19), share("a", 19), write("a", 20), share("a", 20)] {
        let error = b.store.open_read(&stale).await.map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StaleToken);
        assert_eq!(error.floor().unwrap().get(), 20);
    }
    b.assert_clean().await;
}

#[tokio::test]
async fn further_keys_are_fenced_in_the_open_branch_or_refused_without_harm() {
    let b = Bench::new().await;
    commit(&b.open(&write("b", 30)).await).await;
    let branch = b.open(&write("a", 20)).await;
    let error = branch.extend(&[held("b", Mode::Exclusive, 20)]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StaleToken);
    assert_eq!(error.floor().unwrap().get(), 30);
    branch.extend(&[held("c", Mode::Exclusive, 20), held("d", Mode::Shared, 20)]).await.unwrap();
    branch.extend(&[held("c", Mode::Exclusive, 20)]).await.unwrap();
    add(&branch, "alice", 1).await.unwrap();
    commit(&branch).await;
    assert_eq!(b.refusal(&write("c", 19)).await.kind(), ErrorKind::StaleToken);
    assert_eq!(b.refusal(&write("d", 19)).await.kind(), ErrorKind::StaleToken);

    let reading = b.store.open_read(&share("e", 40)).await.unwrap();
    let error = reading.extend(&[held("f", Mode::Shared, 40)]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldDeadlock);
    assert_eq!(error.declare()[0].key.as_str(), "f");
}

#[tokio::test]
async fn purged_rows_refuse_old_tokens() {
    let b = Bench::new().await;
    commit(&b.open(&write("old", 10)).await).await;
    commit(&b.open(&write("new", 50)).await).await;
    let touch = "UPDATE palisade_fence SET touched = 0 WHERE resource = 'old'";
    sqlx::query(touch).execute(b.store.pool()).await.unwrap();
    let hour = Duration::from_secs(3600);
    let first = b.store.purge(hour).await.unwrap();
    assert_eq!((first.rows, first.watermark), (0, 10), "nothing below a mark of its own round");
    let second = b.store.purge(hour).await.unwrap();
    assert_eq!(second.rows, 0, "not before the grace is over");
    later(&b).await;
    let third = b.store.purge(hour).await.unwrap();
    assert_eq!((third.rows, third.watermark), (1, 10));
    let error = b.refusal(&write("old", 10)).await;
    assert_eq!(error.kind(), ErrorKind::StaleToken);
    assert_eq!(error.floor().unwrap().get(), 10, "the watermark");
    let reading = b.store.open_read(&share("other", 9)).await.map(drop).unwrap_err();
    assert_eq!(reading.floor().unwrap().get(), 10);
    commit(&b.open(&write("old", 11)).await).await;
    b.assert_clean().await;
}

/// Lets the grace of the last purge pass.
async fn later(b: &Bench) {
    let sql = "UPDATE palisade_watermark SET advanced = advanced - 60000000";
    sqlx::query(sql).execute(b.store.pool()).await.unwrap();
}

#[tokio::test]
async fn a_purge_keeps_rows_above_a_token_that_is_in_use() {
    let b = Bench::new().await;
    commit(&b.open(&write("idle", 90)).await).await;
    sqlx::query("UPDATE palisade_fence SET touched = 0").execute(b.store.pool()).await.unwrap();
    commit(&b.open(&write("long", 20)).await).await;
    let purged = b.store.purge(Duration::from_secs(3600)).await.unwrap();
    assert_eq!(purged.watermark, 0, "or the holder of 20 would be refused");
}

#[tokio::test]
async fn a_constraint_that_is_checked_at_commit_is_a_rollback() {
    let b = Bench::new().await;
    let schema = "CREATE TABLE entry (name TEXT REFERENCES account (name) \
                  DEFERRABLE INITIALLY DEFERRED)";
    sqlx::query(schema).execute(b.store.pool()).await.unwrap();
    let branch = b.open(&write("a", 10)).await;
    sqlx::query("INSERT INTO entry VALUES ('nobody')").execute(&db(&branch)).await.unwrap();
    let error = rolled_back(branch.commit().await);
    assert_eq!(error.kind(), ErrorKind::Store);
    assert!(error.transaction().is_some());
    b.assert_clean().await;
    commit(&b.open(&write("a", 10)).await).await;
}

#[tokio::test]
async fn a_transaction_that_sqlite_rolled_back_by_itself_is_a_rollback() {
    let b = Bench::new().await;
    let branch = b.open(&write("a", 10)).await;
    let sql = "INSERT OR ROLLBACK INTO account VALUES ('alice', 1)";
    sqlx::query(sql).execute(&db(&branch)).await.unwrap_err();
    branch.rollback().await.unwrap();
    let branch = b.open(&write("a", 10)).await;
    sqlx::query(sql).execute(&db(&branch)).await.unwrap_err();
    assert_eq!(rolled_back(branch.commit().await).kind(), ErrorKind::Aborted);
    b.assert_clean().await;
}

#[tokio::test]
async fn a_future_dropped_at_any_await_leaves_the_pool_clean() {
    let b = Bench::new().await;
    let tokens = std::cell::Cell::new(100);
    let next = || {
        tokens.set(tokens.get() + 1);
        write("a", tokens.get())
    };
    // SQLite answers from a thread, sometimes before the future is polled again: a round has fewer
    // awaits now and then, so there are several.
    let mut awaits = 0;
    for _ in 0..5 {
        let open = || async { b.store.open(&next()).await.map(drop).unwrap() };
        awaits += at_every_await(open, || b.assert_clean()).await;
        let read = || async { b.store.open_read(&next()).await.map(drop).unwrap() };
        awaits += at_every_await(read, || b.assert_clean()).await;
    }
    assert!(awaits > 10, "{awaits}");
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
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_commit_that_was_cancelled_is_in_doubt_ever_after() {
    let b = Bench::new().await;
    let mut branch = b.open(&write("a", 10)).await;
    while drop_after(branch.commit(), 0).await {
        branch = b.open(&write("a", 10)).await;
    }
    assert!(in_doubt(branch.commit().await).is_in_doubt());
    assert!(branch.rollback().await.unwrap_err().is_in_doubt());
}

#[tokio::test]
async fn a_cancelled_branch_does_not_lose_a_database_in_memory() {
    // With the test, sqlx itself drops the connection when an acquire is cancelled while it pings.
    let pool = SqlitePoolOptions::new().max_connections(1).test_before_acquire(false);
    let store = SqlStore::new("memory", pool.connect("sqlite::memory:").await.unwrap());
    store.migrate().await.unwrap();
    for n in 0..20 {
        if drop_after(store.open(&write("a", 10)), n).await {
            break;
        }
    }
    commit(&store.open(&write("a", 20)).await.unwrap()).await;
    let error = store.open(&write("a", 19)).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StaleToken, "the rows are still there");
}

#[tokio::test]
async fn migrations_run_twice_at_once_and_beside_the_programs_own() {
    let directory = tempfile::tempdir().unwrap();
    let pool = open(&directory, SqliteJournalMode::Wal).await;
    let own = directory.path().join("migrations");
    std::fs::create_dir(&own).unwrap();
    std::fs::write(own.join("1_own.sql"), "CREATE TABLE own (id INTEGER)").unwrap();
    let migrator = sqlx::migrate::Migrator::new(own.as_path()).await.unwrap();
    migrator.run(&pool).await.unwrap();
    let stores: Vec<_> = {
        let mut stores = Vec::new();
        for _ in 0..4 {
            stores.push(SqlStore::new("bank", open(&directory, SqliteJournalMode::Wal).await));
        }
        stores
    };
    let runs = stores.iter().map(SqlStore::migrate);
    for result in futures_util::future::join_all(runs).await {
        result.unwrap();
    }
    migrator.run(&pool).await.unwrap();
    stores[0].migrate().await.unwrap();
    let ids = futures_util::future::join_all(stores.iter().map(Store::id)).await;
    let first = *ids[0].as_ref().unwrap();
    assert!(ids.iter().all(|id| *id.as_ref().unwrap() == first), "one id for all");
}

#[tokio::test]
async fn a_database_without_the_tables_says_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let store = SqlStore::new("bank", open(&directory, SqliteJournalMode::Wal).await);
    for error in [
        store.open(&write("a", 1)).await.map(drop).unwrap_err(),
        store.id().await.map(drop).unwrap_err(),
        store.purge(Duration::ZERO).await.map(drop).unwrap_err(),
    ] {
        assert_eq!(error.kind(), ErrorKind::NotMigrated, "{error:?}");
        assert!(error.to_string().contains("migrate()"), "{error}");
    }
    store.migrate().await.unwrap();
    commit(&store.open(&write("a", 1)).await.unwrap()).await;
}

#[tokio::test]
async fn a_pool_that_is_exhausted_or_closed_is_named() {
    let b = Bench::new().await;
    let mut all = Vec::new();
    for _ in 0..4 {
        all.push(b.store.pool().acquire().await.unwrap());
    }
    let error = b.refusal(&with_wait(write("a", 1), Duration::from_millis(100))).await;
    assert!(error.is_unavailable());
    assert!(error.to_string().contains("bank") && error.to_string().contains("max_connections"));
    drop(all);
    b.store.pool().close().await;
    let error = b.refusal(&write("a", 1)).await;
    assert!(error.is_unavailable());
    assert!(error.to_string().contains("closed"), "{error}");
}

#[tokio::test]
async fn a_branch_whose_opening_was_cancelled_can_be_opened_again_by_its_owner() {
    let b = Bench::new().await;
    let mine = write("a", 10);
    for n in 0..10 {
        drop_after(b.store.open(&again(&mine)), n).await;
        b.open(&again(&mine)).await.rollback().await.unwrap();
    }
}
