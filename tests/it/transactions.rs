//! Transactions over memory locks and a SQLite file: nothing installed, everything real.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use palisade::backend::MemoryBackend;
use palisade::{
    Backoff, Coordinator, Error, ErrorKind, Fallback, LockOptions, Locks, Mode, SqlStore,
};
use sqlx::Sqlite;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};
use tempfile::TempDir;

use crate::cancel::at_every_await;

struct Bench {
    backend: Arc<MemoryBackend>,
    bank: SqlStore<Sqlite>,
    coordinator: Coordinator,
    _directory: TempDir,
}

impl Bench {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = SqliteConnectOptions::new()
            .filename(directory.path().join("bank.db"))
            .journal_mode(SqliteJournalMode::Wal)
            .create_if_missing(true);
        let pool = SqlitePoolOptions::new().max_connections(4).connect_with(options).await.unwrap();
        let bank = SqlStore::new("bank", pool);
        bank.migrate().await.unwrap();
        let schema = "CREATE TABLE account (name TEXT PRIMARY KEY, cents INTEGER NOT NULL);
             INSERT INTO account VALUES ('alice', 100), ('bob', 100), ('carol', 100);";
        sqlx::raw_sql(schema).execute(bank.pool()).await.unwrap();
        let backend = Arc::new(MemoryBackend::new());
        let coordinator = Self::join(&backend, &bank).await;
        Self { backend, bank, coordinator, _directory: directory }
    }

    /// Another process, as it were: the same lock service and the same store.
    async fn join(backend: &Arc<MemoryBackend>, bank: &SqlStore<Sqlite>) -> Coordinator {
        let mut options = LockOptions::default();
        options.hand_over.enabled = true;
        let locks = Locks::with_options(Arc::clone(backend) as _, options).await.unwrap();
        Coordinator::builder(locks).store(bank).build()
    }

    async fn cents(&self, name: &str) -> i64 {
        sqlx::query_scalar("SELECT cents FROM account WHERE name = ?")
            .bind(name.to_owned())
            .fetch_one(self.bank.pool())
            .await
            .unwrap()
    }

    /// Nothing is locked, and the pool serves connections without a transaction.
    async fn assert_clean(&self) {
        self.coordinator.settled().await;
        for key in ["alice", "bob", "carol"] {
            let guard = self.coordinator.locks().lock(key).acquire().await.unwrap();
            guard.release().await.unwrap();
        }
        let update = "UPDATE account SET cents = cents WHERE name = 'alice'";
        for _ in 0..4 {
            let mut tx = self.bank.pool().begin_with("BEGIN IMMEDIATE").await.unwrap();
            sqlx::query(update).execute(&mut *tx).await.unwrap();
            tx.rollback().await.unwrap();
        }
    }
}

const ADD: &str = "UPDATE account SET cents = cents + ? WHERE name = ?";

#[tokio::test]
async fn a_committed_transaction_is_there_and_a_dropped_one_is_not() {
    let b = Bench::new().await;
    let tx = b.coordinator.transaction(["alice", "bob"]).begin().await.unwrap();
    let db = tx.enlist(&b.bank).await.unwrap();
    sqlx::query(ADD).bind(-30).bind("alice").execute(&db).await.unwrap();
    sqlx::query(ADD).bind(30).bind("bob").execute(&db).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!((b.cents("alice").await, b.cents("bob").await), (70, 130));

    let tx = b.coordinator.transaction(["alice"]).begin().await.unwrap();
    let db = tx.enlist(&b.bank).await.unwrap();
    sqlx::query(ADD).bind(1000).bind("alice").execute(&db).await.unwrap();
    drop(tx);
    b.assert_clean().await;
    assert_eq!(b.cents("alice").await, 70);
}

#[tokio::test]
async fn a_rolled_back_transaction_leaves_nothing() {
    let b = Bench::new().await;
    let tx = b.coordinator.transaction(["alice"]).begin().await.unwrap();
    let db = tx.enlist(&b.bank).await.unwrap();
    sqlx::query(ADD).bind(1).bind("alice").execute(&db).await.unwrap();
    tx.rollback().await.unwrap();
    b.assert_clean().await;
    assert_eq!(b.cents("alice").await, 100);
}

#[tokio::test]
async fn a_transaction_that_was_overtaken_is_refused_by_the_store() {
    let b = Bench::new().await;
    let slow = b.coordinator.transaction(["alice"]).begin().await.unwrap();
    b.backend.forget();
    let fast = Bench::join(&b.backend, &b.bank).await;
    fast.run(["alice"], async |tx| {
        let db = tx.enlist(&b.bank).await?;
        sqlx::query(ADD).bind(5).bind("alice").execute(&db).await?;
        Ok::<_, Error>(())
    })
    .await
    .unwrap();
    let error = slow.enlist(&b.bank).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StaleToken, "{error}");
    assert!(error.floor().unwrap() > slow.held()[0].token);
    assert!(!slow.is_held(), "a stale token is final for its owner");
    let error = slow.commit().await.unwrap_err();
    assert!(error.is_fenced_out(), "{error}");
    assert_eq!(b.cents("alice").await, 105);
}

#[tokio::test]
async fn run_starts_over_above_the_token_that_the_store_has_seen() {
    let b = Bench::new().await;
    let ahead = palisade::FencingToken::new(
        b.coordinator.locks().lock("x").acquire().await.unwrap().token().get() + 60_000_000,
    );
    let tx = b.coordinator.transaction(["alice"]).floor(ahead.unwrap()).begin().await.unwrap();
    tx.enlist(&b.bank).await.unwrap();
    tx.commit().await.unwrap();
    b.backend.forget();
    let attempts = AtomicU32::new(0);
    let token = b
        .coordinator
        .run(["alice"], async |tx| {
            attempts.fetch_add(1, Ordering::Relaxed);
            tx.enlist(&b.bank).await?;
            Ok::<_, Error>(tx.held()[0].token)
        })
        .await
        .unwrap();
    assert_eq!(attempts.into_inner(), 2);
    assert!(Some(token) > ahead);
}

#[tokio::test]
async fn a_lost_lease_refuses_statements_and_the_commit() {
    let b = Bench::new().await;
    let tx = b.coordinator.transaction(["alice"]).begin().await.unwrap();
    let db = tx.enlist(&b.bank).await.unwrap();
    sqlx::query(ADD).bind(1).bind("alice").execute(&db).await.unwrap();
    b.coordinator.locks().fence_out(tx.owner());
    let error = sqlx::query(ADD).bind(1).bind("alice").execute(&db).await.unwrap_err();
    assert_eq!(Error::from(error).kind(), ErrorKind::LeaseLost);
    assert_eq!(tx.commit().await.unwrap_err().kind(), ErrorKind::LeaseLost);
    b.assert_clean().await;
    assert_eq!(b.cents("alice").await, 100);
}

#[tokio::test]
async fn run_cancels_the_work_when_the_lease_is_lost_and_starts_over() {
    let b = Bench::new().await;
    let attempts = AtomicU32::new(0);
    let request = b.coordinator.transaction(["alice"]).lease(Duration::from_millis(300));
    request
        .run(async |tx| {
            let db = tx.enlist(&b.bank).await?;
            sqlx::query(ADD).bind(1).bind("alice").execute(&db).await?;
            if attempts.fetch_add(1, Ordering::Relaxed) == 0 {
                b.backend.forget();
                std::future::pending::<()>().await;
            }
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(attempts.into_inner(), 2);
    b.assert_clean().await;
    assert_eq!(b.cents("alice").await, 101);
}

#[tokio::test]
async fn an_error_of_the_work_rolls_back_and_is_not_retried() {
    #[derive(Debug)]
    enum Refused {
        Poor,
        Palisade(#[allow(dead_code)] Error),
    }
    impl From<Error> for Refused {
        fn from(error: Error) -> Self {
            Self::Palisade(error)
        }
    }
    let b = Bench::new().await;
    let attempts = AtomicU32::new(0);
    let answer = b.coordinator.run(["alice"], async |tx| {
        attempts.fetch_add(1, Ordering::Relaxed);
        let db = tx.enlist(&b.bank).await?;
        sqlx::query(ADD).bind(1).bind("alice").execute(&db).await.map_err(Error::from)?;
        Err::<(), _>(Refused::Poor)
    });
    assert!(matches!(answer.await, Err(Refused::Poor)));
    assert_eq!(attempts.into_inner(), 1);
    b.assert_clean().await;
    assert_eq!(b.cents("alice").await, 100);
}

#[tokio::test]
async fn a_failed_statement_lets_the_transaction_only_roll_back() {
    let b = Bench::new().await;
    let tx = b.coordinator.transaction(["alice"]).begin().await.unwrap();
    let db = tx.enlist(&b.bank).await.unwrap();
    sqlx::query(ADD).bind(1).bind("alice").execute(&db).await.unwrap();
    let duplicate = "INSERT INTO account VALUES ('alice', 0)";
    sqlx::query(duplicate).execute(&db).await.unwrap_err();
    let error = tx.commit().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Aborted, "{error}");
    b.assert_clean().await;
    assert_eq!(b.cents("alice").await, 100);
}

#[tokio::test]
async fn a_nested_transaction_is_undone_alone() {
    let b = Bench::new().await;
    let mut tx = b.coordinator.transaction(["alice", "bob"]).begin().await.unwrap();
    let db = tx.enlist(&b.bank).await.unwrap();
    sqlx::query(ADD).bind(1).bind("alice").execute(&db).await.unwrap();

    let kept = tx.nested(["alice"]).await.unwrap();
    let db = kept.enlist(&b.bank).await.unwrap();
    sqlx::query(ADD).bind(10).bind("alice").execute(&db).await.unwrap();
    kept.commit().await.unwrap();

    let undone = tx.nested(["carol"]).await.unwrap();
    let db = undone.enlist(&b.bank).await.unwrap();
    sqlx::query("INSERT INTO account VALUES ('alice', 0)").execute(&db).await.unwrap_err();
    undone.rollback().await.unwrap();

    let dropped = tx.nested::<&str>([]).await.unwrap();
    let db = dropped.enlist(&b.bank).await.unwrap();
    sqlx::query(ADD).bind(1000).bind("bob").execute(&db).await.unwrap();
    drop(dropped);

    let held: Vec<_> = tx.held().into_iter().map(|held| held.key.to_string()).collect();
    assert_eq!(held, ["alice", "bob", "carol"], "locks stay until the outermost end");
    tx.commit().await.unwrap();
    b.assert_clean().await;
    assert_eq!((b.cents("alice").await, b.cents("bob").await), (111, 100));
}

#[tokio::test]
async fn a_branch_opened_in_a_nested_transaction_is_undone_with_it() {
    let b = Bench::new().await;
    let mut tx = b.coordinator.transaction(["alice"]).begin().await.unwrap();
    let nested = tx.nested::<&str>([]).await.unwrap();
    let db = nested.enlist(&b.bank).await.unwrap();
    sqlx::query(ADD).bind(1).bind("alice").execute(&db).await.unwrap();
    nested.rollback().await.unwrap();
    let db = tx.enlist(&b.bank).await.unwrap();
    sqlx::query(ADD).bind(5).bind("alice").execute(&db).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(b.cents("alice").await, 105);
}

#[tokio::test]
async fn keys_that_could_deadlock_are_declared_by_run_itself() {
    let b = Bench::new().await;
    let other = b.coordinator.transaction(["alice"]).begin().await.unwrap();
    let attempts = AtomicU32::new(0);
    let work =
        b.coordinator.transaction(["bob"]).wait(Duration::from_secs(5)).run(async |mut tx| {
            attempts.fetch_add(1, Ordering::Relaxed);
            let nested = tx.nested(["alice"]).await?;
            nested.commit().await?;
            Ok::<_, Error>(tx.held().len())
        });
    let (held, committed) = tokio::join!(work, async {
        while attempts.load(Ordering::Relaxed) < 1 {
            tokio::task::yield_now().await;
        }
        other.commit().await
    });
    committed.unwrap();
    assert_eq!(held.unwrap(), 2);
    assert_eq!(attempts.into_inner(), 2, "the second attempt declared both keys");
}

#[tokio::test]
async fn shared_readers_read_side_by_side() {
    let b = Bench::new().await;
    let none: [&str; 0] = [];
    let one = b.coordinator.transaction(none).shared(["alice"]).begin().await.unwrap();
    let two = b.coordinator.transaction(none).shared(["alice"]).begin().await.unwrap();
    for tx in [&one, &two] {
        let db = tx.read(&b.bank).await.unwrap();
        let cents: i64 = sqlx::query_scalar("SELECT cents FROM account WHERE name = 'alice'")
            .fetch_one(&db)
            .await
            .unwrap();
        assert_eq!(cents, 100);
    }
    let error = one.enlist(&b.bank).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Misuse, "nothing is held exclusively: {error}");
    one.commit().await.unwrap();
    two.commit().await.unwrap();
    b.assert_clean().await;
}

#[tokio::test]
async fn a_second_store_and_an_unknown_one_are_refused_by_name() {
    let b = Bench::new().await;
    let second = SqlStore::new("stock", b.bank.pool().clone());
    let locks = b.coordinator.locks().clone();
    let both = Coordinator::builder(locks.clone()).store(&b.bank).store(&second).build();
    let tx = both.transaction(["alice"]).begin().await.unwrap();
    tx.enlist(&b.bank).await.unwrap();
    let error = tx.enlist(&second).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Misuse);
    assert!(error.to_string().contains("\"stock\"") && error.to_string().contains("\"bank\""));
    tx.rollback().await.unwrap();

    let tx = b.coordinator.transaction(["alice"]).begin().await.unwrap();
    let error = tx.enlist(&second).await.unwrap_err();
    assert!(error.to_string().contains("builder"), "{error}");
    let twice = Coordinator::builder(locks).store(&b.bank).store(&b.bank).build();
    let error = twice.transaction(["bob"]).begin().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Misuse);
}

#[tokio::test]
async fn stores_that_are_named_are_fenced_at_begin() {
    let b = Bench::new().await;
    let tx = b.coordinator.transaction(["alice"]).stores([&b.bank]).begin().await.unwrap();
    let writer: String = sqlx::query_scalar("SELECT 'locked' FROM account LIMIT 1")
        .fetch_one(b.bank.pool())
        .await
        .unwrap();
    assert_eq!(writer, "locked");
    let busy = b.bank.pool().begin_with("PRAGMA busy_timeout = 0; BEGIN IMMEDIATE").await;
    assert!(busy.is_err(), "the branch has the write lock of the file");
    tx.rollback().await.unwrap();
}

#[tokio::test]
async fn many_tasks_on_hot_keys_lose_no_update() {
    let b = Bench::new().await;
    let patient = Backoff { max_elapsed: Duration::from_secs(60), ..Backoff::default() };
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..40_u32 {
        let other = Bench::join(&b.backend, &b.bank).await;
        let bank = b.bank.clone();
        tasks.spawn(async move {
            let keys = if n % 2 == 0 { ["alice", "bob"] } else { ["bob", "alice"] };
            let request = other.transaction(keys).wait(Duration::from_secs(30)).retry(patient);
            request
                .run(async |tx| {
                    let db = tx.enlist(&bank).await?;
                    let read = "SELECT cents FROM account WHERE name = 'alice'";
                    let cents: i64 = sqlx::query_scalar(read).fetch_one(&db).await?;
                    tokio::task::yield_now().await;
                    let write = "UPDATE account SET cents = ? WHERE name = 'alice'";
                    sqlx::query(write).bind(cents + 1).execute(&db).await?;
                    Ok::<_, Error>(())
                })
                .await
                .unwrap();
        });
    }
    tasks.join_all().await;
    assert_eq!(b.cents("alice").await, 140);
}

#[tokio::test]
async fn dropping_begin_enlist_commit_or_rollback_at_any_await_leaves_nothing() {
    let b = Bench::new().await;
    let steps = at_every_await(
        || async {
            let tx = b.coordinator.transaction(["alice", "bob"]).begin().await.unwrap();
            let db = tx.enlist(&b.bank).await.unwrap();
            sqlx::query(ADD).bind(1).bind("alice").execute(&db).await.unwrap();
            tx.rollback().await.unwrap();
        },
        || b.assert_clean(),
    )
    .await;
    assert!(steps > 0, "{steps} awaits");
    assert_eq!(b.cents("alice").await, 100);

    let steps = at_every_await(
        || async {
            let tx = b.coordinator.transaction(["alice", "bob"]).begin().await.unwrap();
            let db = tx.enlist(&b.bank).await.unwrap();
            sqlx::query(ADD).bind(1).bind("alice").execute(&db).await.unwrap();
            sqlx::query(ADD).bind(-1).bind("alice").execute(&db).await.unwrap();
            tx.commit().await.unwrap();
        },
        || b.assert_clean(),
    )
    .await;
    assert!(steps > 0, "{steps} awaits");
    assert_eq!(b.cents("alice").await, 100, "a commit is whole or not at all");
}

/// A lock service that is out of reach.
#[derive(Debug)]
struct Unreachable;

#[async_trait::async_trait]
impl palisade::backend::LockBackend for Unreachable {
    fn capabilities(&self) -> palisade::backend::Capabilities {
        palisade::backend::Capabilities::new(1, true)
    }
    async fn subscribe(
        &self,
        _client: palisade::ClientId,
        _sink: palisade::backend::Sink,
    ) -> palisade::Result<()> {
        Ok(())
    }
    fn unsubscribe(&self, _client: palisade::ClientId) {}
    async fn acquire(
        &self,
        _ask: &palisade::protocol::Acquire,
    ) -> palisade::Result<palisade::protocol::Acquired> {
        std::future::pending().await
    }
    async fn renew(
        &self,
        _partition: palisade::Partition,
        _renewals: &[palisade::protocol::Renewal],
    ) -> palisade::Result<Vec<palisade::protocol::Renewed>> {
        std::future::pending().await
    }
    async fn release(
        &self,
        _part: &palisade::protocol::Part,
    ) -> palisade::Result<palisade::protocol::Released> {
        std::future::pending().await
    }
    async fn cancel(&self, _part: &palisade::protocol::Part) -> palisade::Result<()> {
        std::future::pending().await
    }
    async fn inspect(
        &self,
        _partition: palisade::Partition,
        _key: &palisade::ResourceKey,
    ) -> palisade::Result<palisade::protocol::Inspection> {
        std::future::pending().await
    }
    async fn ping(&self) -> palisade::Result<()> {
        std::future::pending().await
    }
}

#[tokio::test]
async fn without_the_lock_service_begin_ends_within_its_deadline_as_its_fallback_says() {
    let b = Bench::new().await;
    let locks = Locks::new(Unreachable).await.unwrap();
    let coordinator =
        Coordinator::builder(locks).store(&b.bank).wait(Duration::from_millis(300)).build();
    let started = std::time::Instant::now();
    let error = coordinator.transaction(["alice"]).begin().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    // Without the wait it would end with the call, after two seconds.
    assert!(started.elapsed() < Duration::from_millis(1_900), "{:?}", started.elapsed());

    let done = Arc::new(AtomicU32::new(0));
    let fallback = Fallback::handler({
        let done = Arc::clone(&done);
        move |outage| {
            let done = Arc::clone(&done);
            async move {
                assert_eq!(outage.keys, ["alice", "rates"]);
                done.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
        }
    });
    let request = coordinator.transaction(["alice"]).shared(["rates"]).fallback(fallback);
    let tx = request.begin().await.unwrap();
    assert!(tx.is_degraded() && !tx.is_held());
    let error = tx.enlist(&b.bank).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Degraded);
    tx.commit().await.unwrap();
    assert_eq!(done.load(Ordering::Relaxed), 1);

    let refusal = Fallback::handler(async |_| {
        Err(Error::new(ErrorKind::Unavailable, "begin", "not this one"))
    });
    let error = coordinator.transaction(["alice"]).fallback(refusal).begin().await.unwrap_err();
    assert!(error.to_string().contains("not this one"));
}

#[tokio::test]
async fn a_missing_migration_is_named_with_its_remedy() {
    let b = Bench::new().await;
    sqlx::raw_sql("DROP TABLE palisade_fence").execute(b.bank.pool()).await.unwrap();
    let tx = b.coordinator.transaction(["alice"]).begin().await.unwrap();
    let error = tx.enlist(&b.bank).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotMigrated, "{error}");
    assert!(error.to_string().contains("migrate"), "{error}");
    assert_eq!(tx.held()[0].mode, Mode::Exclusive);
}

/// `run` from a method that borrows the service, spawned: the form that business code has.
struct Service {
    coordinator: Coordinator,
    bank: SqlStore<Sqlite>,
}

impl Service {
    async fn pay(&self, to: &str, cents: i64) -> Result<i64, Error> {
        self.coordinator
            .run([to], async |tx| {
                let db = tx.enlist(&self.bank).await?;
                sqlx::query(ADD).bind(cents).bind(to).execute(&db).await?;
                let read = "SELECT cents FROM account WHERE name = ?";
                Ok(sqlx::query_scalar(read).bind(to).fetch_one(&db).await?)
            })
            .await
    }
}

#[tokio::test]
async fn run_can_be_spawned_from_a_method_that_borrows_self() {
    let b = Bench::new().await;
    let service = Arc::new(Service { coordinator: b.coordinator.clone(), bank: b.bank.clone() });
    let task = tokio::spawn(async move { service.pay("bob", 7).await });
    assert_eq!(task.await.unwrap().unwrap(), 107);
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_that_pass_a_lock_among_themselves_lose_no_update() {
    let b = Bench::new().await;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let (coordinator, bank) = (b.coordinator.clone(), b.bank.clone());
        tasks.spawn(async move {
            for _ in 0..5 {
                let tx = coordinator.transaction(["alice"]).wait(Duration::from_secs(60)).begin();
                let tx = tx.await.unwrap();
                let db = tx.enlist(&bank).await.unwrap();
                let read = "SELECT cents FROM account WHERE name = 'alice'";
                let cents: i64 = sqlx::query_scalar(read).fetch_one(&db).await.unwrap();
                let write = "UPDATE account SET cents = ? WHERE name = 'alice'";
                sqlx::query(write).bind(cents + 1).execute(&db).await.unwrap();
                tx.commit().await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    assert_eq!(b.cents("alice").await, 100 + 64 * 5, "each token is above the one before");
    b.assert_clean().await;
}
