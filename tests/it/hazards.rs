//! Interleavings that once cost a lease, a row or an answer: slow and late replies, leaked handles,
//! failures half-way, a watchdog that dies.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use async_trait::async_trait;
use palisade::backend::{Capabilities, LockBackend, MemoryBackend, Sink};
use palisade::protocol::{Acquire, Acquired, Inspection, Part, Released, Renewal, Renewed};
use palisade::{
    Backoff, ClientId, Coordinator, Error, ErrorKind, LockOptions, Locks, Partition, ResourceKey,
    SqlStore,
};
use sqlx::Sqlite;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};

/// A lock service in memory that answers late, hangs or panics on demand.
#[derive(Debug)]
struct Odd {
    inner: MemoryBackend,
    acquire_ms: AtomicU64,
    renew_ms: AtomicU64,
    renewed_ms: AtomicU64,
    release_ms: AtomicU64,
    hang_release_on: AtomicU32,
    renew_panics: AtomicBool,
    renews: AtomicU32,
}

impl Odd {
    fn new(partitions: u16) -> Arc<Self> {
        Arc::new(Self {
            inner: MemoryBackend::with_partitions(partitions),
            acquire_ms: 0.into(),
            renew_ms: 0.into(),
            renewed_ms: 0.into(),
            release_ms: 0.into(),
            hang_release_on: AtomicU32::new(u32::MAX),
            renew_panics: false.into(),
            renews: 0.into(),
        })
    }
}

#[async_trait]
impl LockBackend for Odd {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    async fn subscribe(&self, c: ClientId, s: Sink) -> palisade::Result<()> {
        self.inner.subscribe(c, s).await
    }
    fn unsubscribe(&self, c: ClientId) {
        self.inner.unsubscribe(c)
    }
    async fn acquire(&self, a: &Acquire) -> palisade::Result<Acquired> {
        let answer = self.inner.acquire(a).await;
        sleep(Duration::from_millis(self.acquire_ms.load(SeqCst))).await;
        answer
    }
    async fn renew(&self, p: Partition, r: &[Renewal]) -> palisade::Result<Vec<Renewed>> {
        self.renews.fetch_add(1, SeqCst);
        assert!(!self.renew_panics.load(SeqCst), "renew panics");
        sleep(Duration::from_millis(self.renew_ms.load(SeqCst))).await;
        let answer = self.inner.renew(p, r).await;
        sleep(Duration::from_millis(self.renewed_ms.load(SeqCst))).await;
        answer
    }
    async fn release(&self, p: &Part) -> palisade::Result<Released> {
        if u32::from(p.partition.0) == self.hang_release_on.load(SeqCst) {
            std::future::pending::<()>().await;
        }
        sleep(Duration::from_millis(self.release_ms.load(SeqCst))).await;
        self.inner.release(p).await
    }
    async fn cancel(&self, p: &Part) -> palisade::Result<()> {
        self.inner.cancel(p).await
    }
    async fn inspect(&self, p: Partition, k: &ResourceKey) -> palisade::Result<Inspection> {
        self.inner.inspect(p, k).await
    }
    async fn ping(&self) -> palisade::Result<()> {
        Ok(())
    }
}

async fn over(b: &Arc<Odd>) -> Locks {
    Locks::with_options(Arc::clone(b) as _, LockOptions::default()).await.unwrap()
}

fn key_in(p: u16, of: u16, n: usize) -> String {
    (0..)
        .map(|i| format!("k{i}"))
        .filter(|k| ResourceKey::parse(k).unwrap().partition(of).0 == p)
        .nth(n)
        .unwrap()
}

#[tokio::test(start_paused = true)]
async fn what_outlives_a_guard_does_not_take_its_keys_for_held() {
    let locks = over(&Odd::new(1)).await;
    let guard = locks.lock("k").acquire().await.unwrap();
    let locked = guard.locked().clone();
    guard.release().await.unwrap();
    assert!(!locked.is_held());
}

#[tokio::test(start_paused = true)]
async fn active_counts_what_is_held() {
    let locks = over(&Odd::new(8)).await;
    let many: Vec<_> = (0..30).map(|n| format!("k{n}")).collect();
    locks.lock_all(&many).acquire().await.unwrap().release().await.unwrap();
    let _held = locks.lock("one").acquire().await.unwrap();
    assert_eq!(locks.statistics().active, 1, "{:?}", locks.statistics());
}

#[tokio::test(start_paused = true)]
async fn waiting_for_ever_is_possible() {
    let locks = over(&Odd::new(1)).await;
    locks.lock("k").wait(Duration::MAX).acquire().await.unwrap().release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn holding_for_ever_is_possible() {
    let locks = over(&Odd::new(1)).await;
    locks.lock("k").max_hold(Duration::MAX).acquire().await.unwrap().release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_slow_answer_costs_no_lease() {
    let odd = Odd::new(1);
    let locks = over(&odd).await;
    odd.acquire_ms.store(1_500, SeqCst);
    let guard = locks.lock("k").ttl(Duration::from_secs(2)).acquire().await.unwrap();
    sleep(Duration::from_secs(4)).await;
    assert!(guard.is_held(), "renewals sent: {}", odd.renews.load(SeqCst));
}

#[tokio::test(start_paused = true)]
async fn a_hung_partition_delays_nobody_else() {
    let odd = Odd::new(2);
    let locks = over(&odd).await;
    let mut drop_me = Vec::new();
    for n in 0..100 {
        drop_me.push(locks.lock(key_in(1, 2, n)).acquire().await.unwrap());
    }
    let healthy =
        locks.lock(key_in(0, 2, 0)).ttl(Duration::from_millis(1_500)).acquire().await.unwrap();
    odd.hang_release_on.store(1, SeqCst);
    drop(drop_me);
    sleep(Duration::from_secs(5)).await;
    assert!(healthy.is_held(), "renewals sent: {}", odd.renews.load(SeqCst));
}

#[tokio::test(start_paused = true)]
async fn shutdown_waits_for_a_release_under_way() {
    let odd = Odd::new(1);
    let locks = over(&odd).await;
    let guard = locks.lock("k").acquire().await.unwrap();
    odd.release_ms.store(1_000, SeqCst);
    tokio::spawn(guard.release());
    sleep(Duration::from_millis(10)).await;
    locks.shutdown().await.unwrap();
    assert_eq!(locks.inspect("k").await.unwrap().holders.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_late_renewal_after_the_release_is_no_loss() {
    let odd = Odd::new(1);
    let locks = over(&odd).await;
    let guard = locks.lock("k").ttl(Duration::from_secs(3)).acquire().await.unwrap();
    odd.renew_ms.store(100, SeqCst);
    sleep(Duration::from_millis(1_010)).await;
    while odd.renews.load(SeqCst) == 0 {
        sleep(Duration::from_millis(1)).await;
    }
    guard.release().await.unwrap();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(locks.statistics().lost, 0);
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_is_answered_after_the_end_of_the_lease_is_a_loss() {
    let odd = Odd::new(1);
    let locks = over(&odd).await;
    let lease = Duration::from_secs(1);
    let guard = locks.lock("k").ttl(lease).auto_renew(false).acquire().await.unwrap();
    odd.renewed_ms.store(1_500, SeqCst);
    assert_eq!(guard.renew().await.unwrap_err().kind(), ErrorKind::LeaseLost);
    assert!(!guard.is_held());
}

#[tokio::test(start_paused = true)]
async fn a_watchdog_that_dies_costs_every_lease() {
    let odd = Odd::new(1);
    let locks = over(&odd).await;
    odd.renew_panics.store(true, SeqCst);
    let guard = locks.lock("k").ttl(Duration::from_secs(3)).acquire().await.unwrap();
    assert!(
        timeout(Duration::from_secs(60), guard.lost()).await.is_ok(),
        "held: {}",
        guard.is_held()
    );
}

#[tokio::test(start_paused = true)]
async fn what_is_granted_after_the_watchdog_died_is_lost_at_once() {
    let odd = Odd::new(1);
    let locks = over(&odd).await;
    odd.renew_panics.store(true, SeqCst);
    let first = locks.lock("first").ttl(Duration::from_secs(3)).acquire().await.unwrap();
    odd.acquire_ms.store(1_500, SeqCst);
    let late = tokio::spawn(locks.lock("late").acquire());
    first.lost().await;
    assert!(!late.is_finished(), "it was asked for before");
    let error = timeout(Duration::from_secs(60), late).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LeaseLost, "{error}");
}

#[test]
fn a_number_that_is_no_token_is_not_read_as_one() {
    let read = serde_json::from_str::<palisade::FencingToken>;
    assert!(read("18446744073709551615").is_err() && read("0").is_err());
    assert_eq!(read("7").unwrap().get(), 7);
}

struct Bench {
    backend: Arc<MemoryBackend>,
    bank: SqlStore<Sqlite>,
    coordinator: Coordinator,
    _d: TempDir,
}

impl Bench {
    async fn new() -> Self {
        let d = tempfile::tempdir().unwrap();
        let options = SqliteConnectOptions::new()
            .filename(d.path().join("bank.db"))
            .journal_mode(SqliteJournalMode::Wal)
            .create_if_missing(true);
        let pool = SqlitePoolOptions::new().max_connections(4).connect_with(options).await.unwrap();
        let bank = SqlStore::new("bank", pool);
        bank.migrate().await.unwrap();
        let schema = "CREATE TABLE account (name TEXT PRIMARY KEY, cents INTEGER NOT NULL);
             INSERT INTO account VALUES ('alice', 100), ('bob', 100), ('carol', 100);";
        sqlx::raw_sql(schema).execute(bank.pool()).await.unwrap();
        let backend = Arc::new(MemoryBackend::new());
        let locks =
            Locks::with_options(Arc::clone(&backend) as _, LockOptions::default()).await.unwrap();
        let coordinator =
            Coordinator::builder(locks).store(&bank).lease(Duration::from_millis(300)).build();
        Self { backend, bank, coordinator, _d: d }
    }
    async fn cents(&self, name: &str) -> i64 {
        sqlx::query_scalar("SELECT cents FROM account WHERE name = ?")
            .bind(name.to_owned())
            .fetch_one(self.bank.pool())
            .await
            .unwrap()
    }
}
const ADD: &str = "UPDATE account SET cents = cents + ? WHERE name = ?";

#[tokio::test]
async fn zero_wait_still_opens_a_branch() {
    let b = Bench::new().await;
    let mut errors = Vec::new();
    for _ in 0..5 {
        let tx = b.coordinator.transaction(["alice"]).wait(Duration::ZERO).begin().await.unwrap();
        if let Err(e) = tx.enlist(&b.bank).await {
            errors.push(format!("{:?} {e}", e.kind()));
        }
        tx.rollback().await.unwrap();
    }
    assert!(errors.is_empty(), "{errors:?}");
}

#[tokio::test]
async fn a_key_that_was_refused_by_the_fence_is_not_taken_for_fenced() {
    let b = Bench::new().await;
    let mut tx = b.coordinator.transaction(["alice"]).begin().await.unwrap();
    tx.read(&b.bank).await.unwrap();
    tx.enlist(&b.bank).await.unwrap();
    let first = tx.nested(["carol"]).await.map(drop).unwrap_err();
    {
        let Ok(nested) = tx.nested(["carol"]).await else { return };
        let db = nested.enlist(&b.bank).await.unwrap();
        sqlx::query(ADD).bind(1).bind("carol").execute(&db).await.unwrap();
        nested.commit().await.unwrap();
    }
    tx.commit().await.unwrap();
    let rows: i64 =
        sqlx::query_scalar("SELECT count(*) FROM palisade_fence WHERE resource = 'carol'")
            .fetch_one(b.bank.pool())
            .await
            .unwrap();
    assert_eq!(rows, 1, "written and committed without a fence, after {first}");
}

#[tokio::test]
async fn what_follows_a_leaked_nested_is_not_lost_in_silence() {
    let b = Bench::new().await;
    let mut tx = b.coordinator.transaction(["alice"]).begin().await.unwrap();
    tx.enlist(&b.bank).await.unwrap();
    std::mem::forget(tx.nested::<&str>([]).await.unwrap());
    let db = tx.enlist(&b.bank).await.unwrap();
    sqlx::query(ADD).bind(5).bind("alice").execute(&db).await.unwrap();
    let answer = tx.commit().await;
    assert!(
        answer.is_err() || b.cents("alice").await == 105,
        "{answer:?}, {}",
        b.cents("alice").await
    );
}

#[tokio::test]
async fn a_loop_of_nested_transactions_on_a_held_key_has_no_limit() {
    let b = Bench::new().await;
    let mut tx = b.coordinator.transaction(["alice"]).begin().await.unwrap();
    for n in 0..100 {
        let nested = tx.nested(["alice"]).await.map_err(|e| format!("{n}: {e}")).unwrap();
        nested.commit().await.unwrap();
    }
}

#[tokio::test]
async fn a_lost_lease_hides_no_doubt() {
    let b = Bench::new().await;
    let tx = b.coordinator.transaction(["alice"]).begin().await.unwrap();
    let db = tx.enlist(&b.bank).await.unwrap();
    sqlx::query(ADD).bind(5).bind("alice").execute(&db).await.unwrap();
    sqlx::raw_sql("COMMIT").execute(&db).await.unwrap();
    b.backend.forget();
    tx.lost().await;
    let error = tx.commit().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InDoubt, "{error}, cents {}", b.cents("alice").await);
}

#[tokio::test]
async fn run_never_starts_over_in_doubt() {
    let b = Bench::new().await;
    let runs = AtomicU32::new(0);
    let answer: Result<(), Error> = b
        .coordinator
        .run(["alice"], async |tx| {
            let db = tx.enlist(&b.bank).await?;
            sqlx::query(ADD).bind(5).bind("alice").execute(&db).await?;
            if runs.fetch_add(1, SeqCst) == 0 {
                sqlx::raw_sql("COMMIT").execute(&db).await?;
                b.backend.forget();
                tx.lost().await;
                sleep(Duration::from_secs(1)).await;
            }
            Ok(())
        })
        .await;
    assert!(
        answer.is_err() && b.cents("alice").await == 105,
        "{answer:?}, {} runs, cents {}",
        runs.load(SeqCst),
        b.cents("alice").await
    );
}

#[tokio::test]
async fn a_key_granted_after_the_end_is_given_up() {
    let b = Bench::new().await;
    let bob = b.coordinator.locks().lock("bob").acquire().await.unwrap();
    let (tell, mut told) = tokio::sync::mpsc::channel(1);
    b.coordinator
        .run(["alice"], async |mut tx| {
            let tell = tell.clone();
            tokio::spawn(async move {
                let answer = tx.nested(["bob"]).await.map(drop).map_err(|e| e.kind());
                tell.send(answer).await.unwrap();
                std::future::pending::<()>().await;
                drop(tx);
            });
            sleep(Duration::from_millis(50)).await;
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    bob.release().await.unwrap();
    let answer = told.recv().await.unwrap();
    sleep(Duration::from_millis(700)).await;
    let held = b.coordinator.locks().inspect("bob").await.unwrap().holders.len();
    assert!(held == 0, "nested said {answer:?}; bob has {held} holders two leases later");
}

#[tokio::test]
async fn a_failure_that_was_dealt_with_does_not_keep_run_from_starting_over() {
    // A refusal that advises nothing, dealt with, then a stale token at the end.
    let b = Bench::new().await;
    let other = b.coordinator.locks().lock("zoe").acquire().await.unwrap();
    let runs = AtomicU32::new(0);
    let answer: Result<(), Error> = b
        .coordinator
        .transaction(["alice"])
        .wait(Duration::from_millis(150))
        .retry(Backoff::default())
        .run(async |mut tx| {
            if runs.fetch_add(1, SeqCst) == 0 {
                let timed_out = tx.nested(["zoe"]).await.map(drop).unwrap_err();
                assert_eq!(timed_out.kind(), ErrorKind::TimedOut, "{timed_out}");
                b.backend.forget();
                tx.lost().await;
            }
            Ok(())
        })
        .await;
    drop(other);
    assert!(answer.is_ok(), "{answer:?} after {} runs", runs.load(SeqCst));
}

#[allow(dead_code)]
#[tokio::test]
async fn run_rises_above_a_token_of_a_key_that_work_adds() {
    let b = Bench::new().await;
    let odd = Odd::new(2);
    let locks = over(&odd).await;
    let coordinator = Coordinator::builder(locks).store(&b.bank).build();
    let (low, high) = (key_in(0, 2, 0), key_in(1, 2, 0));
    let ahead = i64::try_from(
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_micros(),
    )
    .unwrap()
        + 3_600_000_000;
    // A holder whose lock service had a clock one hour ahead.
    let tx = b.coordinator.transaction([&high]).begin().await.unwrap();
    tx.enlist(&b.bank).await.unwrap();
    tx.commit().await.unwrap();
    sqlx::query("UPDATE palisade_fence SET write_token = ? WHERE resource = ?")
        .bind(ahead)
        .bind(high.clone())
        .execute(b.bank.pool())
        .await
        .unwrap();
    let runs = AtomicU32::new(0);
    let retry = Backoff { max_elapsed: Duration::from_secs(3), ..Backoff::default() };
    let answer: Result<(), Error> = coordinator
        .transaction([&low])
        .retry(retry)
        .run(async |mut tx| {
            runs.fetch_add(1, SeqCst);
            tx.enlist(&b.bank).await?;
            tx.nested([&high]).await?.commit().await
        })
        .await;
    assert!(answer.is_ok(), "{answer:?} after {} runs", runs.load(SeqCst));
}

#[tokio::test]
async fn held_is_in_its_strongest_mode() {
    let b = Bench::new().await;
    let owner = b.coordinator.locks().owner();
    let _guard = b.coordinator.locks().lock("alice").owner(owner).acquire().await.unwrap();
    let none: [&str; 0] = [];
    let mut tx =
        b.coordinator.transaction(none).shared(["alice"]).owner(owner).begin().await.unwrap();
    tx.nested(["alice"]).await.unwrap().commit().await.unwrap();
    assert_eq!(tx.held()[0].mode, palisade::Mode::Exclusive);
    tx.enlist(&b.bank).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_lost_on_arrival_is_not_a_grant() {
    let odd = Odd::new(1);
    let locks = over(&odd).await;
    odd.acquire_ms.store(1_500, SeqCst);
    let answer = locks.lock("k").ttl(Duration::from_secs(1)).acquire().await;
    assert!(answer.as_ref().map_or(true, |g| g.is_held()), "{:?}", locks.statistics());
}

#[tokio::test(start_paused = true)]
async fn the_calls_under_way_are_bounded() {
    let odd = Odd::new(1);
    let locks = over(&odd).await;
    let mut guards = Vec::new();
    for n in 0..3_000 {
        guards.push(locks.lock(format!("k{n}")).acquire().await.unwrap());
    }
    odd.release_ms.store(50, SeqCst);
    let started = Instant::now();
    drop(guards);
    while locks.inspect("k2999").await.unwrap().holders.len() == 1 {
        sleep(Duration::from_millis(5)).await;
    }
    // 3000 releases of 50 ms, 64 at a time, take at least 2 s.
    assert!(started.elapsed() > Duration::from_secs(1), "{:?}", started.elapsed());
}

#[tokio::test]
async fn zero_wait_opens_a_branch_over_a_new_connection() {
    let b = Bench::new().await;
    let mut errors = Vec::new();
    for n in 0..20 {
        let options = SqliteConnectOptions::new().filename(b._d.path().join("bank.db"));
        let pool = SqlitePoolOptions::new().max_connections(4).connect_lazy_with(options);
        let bank = SqlStore::new("bank", pool);
        let coordinator = Coordinator::builder(b.coordinator.locks().clone()).store(&bank).build();
        let tx =
            coordinator.transaction([format!("n{n}")]).wait(Duration::ZERO).begin().await.unwrap();
        if let Err(e) = tx.enlist(&bank).await {
            errors.push(format!("{:?} {e}", e.kind()));
        }
        tx.rollback().await.unwrap();
    }
    assert!(errors.is_empty(), "{} {:?}", errors.len(), errors.first());
}
