//! Money from one account to another, in PostgreSQL.
//!
//! Three ways with the same statements and the same pool: ours; the same by hand, with the bare
//! lock scripts and a fence of one statement; and row locks alone, without any lock service. And
//! where the lock service is away: ours on the fence rows, and a fence of one statement by hand.

use std::sync::Arc;
use std::time::Duration;

use palisade::{Coordinator, Fallback, LockOptions, Locks, SqlStore};
use sqlx::postgres::PgPoolOptions;
use sqlx::{PgPool, Postgres};
use tokio::time::sleep;

use crate::bare::BareLocks;
use crate::pairs::{Pairs, alternate};
use crate::report::{Figure, Goal};
use crate::support::{Cuttable, PostgresServer, RedisServer};
use crate::window::{Window, steady};
use crate::{Bench, multi_thread};

const TASKS: [u32; 2] = [8, 32];

/// So many that hardly anybody ever waits for anybody.
const ACCOUNTS: u32 = 4_000;
const OPENING: i64 = 1_000_000;

const TABLES: &str = include_str!("sql/tables.sql");
const FENCE: &str = include_str!("sql/fence.sql");
const STORE_FENCE: &str = include_str!("sql/store_fence.sql");
const OPEN: &str = "INSERT INTO account SELECT 'account:' || n, $2 \
                    FROM generate_series(0, $1 - 1) AS n ON CONFLICT DO NOTHING";
const READ: &str = "SELECT id, balance FROM account WHERE id = ANY ($1) ORDER BY id";
const READ_AND_LOCK: &str =
    "SELECT id, balance FROM account WHERE id = ANY ($1) ORDER BY id FOR UPDATE";
const WRITE: &str = "UPDATE account SET balance = $2 WHERE id = $1";
const SUM: &str = "SELECT sum(balance)::bigint FROM account";

pub fn run(bench: &mut Bench) {
    let (redis, postgres) = (RedisServer::start(), PostgresServer::start());
    let window = bench.window(190, 1_200);
    let (mut transfers, mut plains, mut degraded) = (Vec::new(), Vec::new(), Vec::new());
    multi_thread().block_on(async {
        for tasks in TASKS {
            bench.report.measuring(format!("transfers: {tasks} tasks"));
            let bank = Bank::open(&redis, &postgres, tasks).await;
            let ours = async || repeat(&bank, &redis, window, tasks, ours).await;
            let by_hand = async || repeat(&bank, &redis, window, tasks, by_hand).await;
            let plain = async || repeat(&bank, &redis, window, tasks, plain).await;
            transfers.push((tasks, alternate(ours, by_hand).await));
            plains.push((tasks, alternate(ours, plain).await));
            let on_rows = async || repeat(&bank, &redis, window, tasks, on_rows).await;
            let rows_by_hand = async || repeat(&bank, &redis, window, tasks, rows_by_hand).await;
            degraded.push((tasks, alternate(on_rows, rows_by_hand).await));
            bank.close().await;
        }
    });
    bench.report.note(conditions(&postgres));
    let figure = |name, goal| {
        move |(tasks, pairs): &(u32, Pairs)| {
            Figure::new(name, pairs.ratio())
                .at("tasks", *tasks)
                .goal(Goal::AtLeast(goal))
                .beside("per_s", pairs.ours(Window::per_second).median)
                .beside("bare_per_s", pairs.bare(Window::per_second).median)
                .beside("us", pairs.ours(Window::client_us_each).median)
                .beside("bare_us", pairs.bare(Window::client_us_each).median)
        }
    };
    bench.report.add(transfers.iter().map(figure("pg_transfer_ratio", 0.9)));
    bench.report.add(plains.iter().map(figure("pg_plain_ratio", 0.6)));
    bench.report.add(degraded.iter().map(figure("store_fence_ratio", 0.9)));
}

/// What the database was told, and what every way was given.
fn conditions(postgres: &PostgresServer) -> String {
    let show = |setting: &str| postgres.execute(&format!("SHOW {setting}"));
    let version = show("server_version");
    format!(
        "PostgreSQL {}, fsync {}, synchronous_commit {}; {ACCOUNTS} accounts, a connection a task",
        version.split(' ').next().unwrap_or("?"),
        show("fsync"),
        show("synchronous_commit"),
    )
}

/// Everything that the three ways need.
struct Bank {
    pool: PgPool,
    store: SqlStore<Postgres>,
    coordinator: Coordinator,
    /// Its lock service is out of reach.
    degraded: Coordinator,
    bare: BareLocks,
}

impl Bank {
    /// A bank whose pool has a connection for each task.
    async fn open(redis: &RedisServer, postgres: &PostgresServer, tasks: u32) -> Arc<Self> {
        let pool = PgPoolOptions::new().max_connections(tasks).test_before_acquire(false);
        let pool = pool.connect(&postgres.url()).await.expect("a pool");
        let store = SqlStore::new("bank", pool.clone());
        store.migrate().await.expect("palisade's tables");
        sqlx::raw_sql(TABLES).execute(&pool).await.expect("the bank's tables");
        let opening = sqlx::query(OPEN).bind(i64::from(ACCOUNTS)).bind(OPENING);
        opening.execute(&pool).await.expect("the accounts");
        let locks = palisade::connect(&redis.url()).await.expect("a lock service");
        let coordinator = Coordinator::builder(locks).store(&store).build();
        let away = Cuttable::new(Arc::default());
        away.cut(true);
        let away = Locks::with_options(away, LockOptions::default()).await.expect("a service");
        let fallback = Fallback::StoreFence;
        let degraded = Coordinator::builder(away).store(&store).fallback(fallback).build();
        let bare = BareLocks::connect(&redis.url()).await;
        Arc::new(Self { pool, store, coordinator, degraded, bare })
    }

    /// No transfer makes money or loses any.
    async fn close(&self) {
        let sum: i64 = sqlx::query_scalar(SUM).fetch_one(&self.pool).await.expect("the sum");
        assert_eq!(sum, i64::from(ACCOUNTS) * OPENING, "money was made or lost");
        self.pool.close().await;
    }
}

/// The keys of a transfer, which are also the ids of its accounts, in their order.
type Keys = [String; 2];

fn any_two() -> Keys {
    let first = fastrand::u32(..ACCOUNTS);
    let second = (first + fastrand::u32(1..ACCOUNTS)) % ACCOUNTS;
    let mut keys = [format!("account:{first}"), format!("account:{second}")];
    keys.sort();
    keys
}

/// Reads both accounts and writes both: the statements that all three ways have in common.
macro_rules! transfer {
    ($db:expr, $read:expr, $keys:expr) => {
        let accounts = sqlx::query_as::<_, (String, i64)>($read).bind(&$keys[..]);
        let accounts = accounts.fetch_all($db).await.expect("two accounts");
        assert_eq!(accounts.len(), 2);
        for ((id, balance), change) in accounts.iter().zip([-1, 1]) {
            let write = sqlx::query(WRITE).bind(id).bind(balance + change);
            assert_eq!(write.execute($db).await.expect("it is written").rows_affected(), 1);
        }
    };
}

async fn ours(bank: Arc<Bank>, keys: Keys) {
    let tx = bank.coordinator.transaction(&keys).begin().await.expect("the locks");
    let db = tx.enlist(&bank.store).await.expect("a branch");
    transfer!(&db, READ, keys);
    tx.commit().await.expect("it is committed");
}

async fn by_hand(bank: Arc<Bank>, keys: Keys) {
    let grant = loop {
        match bank.bare.try_acquire(&keys).await {
            Some(grant) => break grant,
            None => sleep(Duration::from_millis(1)).await,
        }
    };
    let mut tx = bank.pool.begin().await.expect("a transaction");
    let fence = sqlx::query(FENCE).bind(&keys[..]).bind(grant.token).execute(&mut *tx).await;
    assert_eq!(fence.expect("an answer").rows_affected(), 2, "the token is newer");
    transfer!(&mut *tx, READ, keys);
    tx.commit().await.expect("it is committed");
    bank.bare.release(&keys, grant).await;
}

/// Without a lock service: the fence rows are the locks.
async fn on_rows(bank: Arc<Bank>, keys: Keys) {
    let request = bank.degraded.transaction(&keys).stores([&bank.store]);
    let tx = request.begin().await.expect("the rows");
    let db = tx.enlist(&bank.store).await.expect("a branch");
    transfer!(&db, READ, keys);
    tx.commit().await.expect("it is committed");
}

async fn rows_by_hand(bank: Arc<Bank>, keys: Keys) {
    let mut tx = bank.pool.begin().await.expect("a transaction");
    let fence = sqlx::query(STORE_FENCE).bind(&keys[..]).fetch_all(&mut *tx).await;
    assert_eq!(fence.expect("the tokens").len(), 2, "the rows are taken");
    transfer!(&mut *tx, READ, keys);
    tx.commit().await.expect("it is committed");
}

async fn plain(bank: Arc<Bank>, keys: Keys) {
    let mut tx = bank.pool.begin().await.expect("a transaction");
    transfer!(&mut *tx, READ_AND_LOCK, keys);
    tx.commit().await.expect("it is committed");
}

async fn repeat<Fut: Future<Output = ()> + Send>(
    bank: &Arc<Bank>,
    redis: &RedisServer,
    window: Duration,
    tasks: u32,
    way: impl Fn(Arc<Bank>, Keys) -> Fut + Copy + Send + 'static,
) -> Window {
    let step = || {
        let bank = Arc::clone(bank);
        move || way(Arc::clone(&bank), any_two())
    };
    steady(redis, window, (0..tasks).map(|_| step()).collect()).await
}
