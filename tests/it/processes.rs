//! Real processes that are killed and stopped while they hold a lock, wait for one, or have rows
//! locked in PostgreSQL: the others go on within one lease, and nothing stale is committed.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use palisade::{Coordinator, Error, SqlStore};
use sqlx::Postgres;
use sqlx::postgres::PgPoolOptions;

use crate::support::{PostgresServer, Proxy, RedisServer, program};

const LEASE: Duration = Duration::from_secs(2);
/// What a loaded machine may add.
const SLACK: Duration = Duration::from_secs(4);

struct Bench {
    redis: RedisServer,
    postgres: PostgresServer,
    bank: SqlStore<Postgres>,
    coordinator: Coordinator,
}

impl Bench {
    async fn new() -> Self {
        let (redis, postgres) = (RedisServer::start(), PostgresServer::start());
        let pool = PgPoolOptions::new().max_connections(4).connect(&postgres.url()).await.unwrap();
        let bank = SqlStore::new("bank", pool);
        bank.migrate().await.unwrap();
        let schema = "CREATE TABLE account (name TEXT PRIMARY KEY, cents BIGINT NOT NULL);
             INSERT INTO account VALUES ('k', 0);";
        sqlx::raw_sql(schema).execute(bank.pool()).await.unwrap();
        let locks = palisade::connect(&redis.url()).await.unwrap();
        let coordinator = Coordinator::builder(locks)
            .store(&bank)
            .lease(LEASE)
            .wait(Duration::from_secs(30))
            .build();
        Self { redis, postgres, bank, coordinator }
    }

    fn start(&self, step: &str) -> Holder {
        self.start_on(&self.redis.url(), step)
    }

    fn start_on(&self, locks: &str, step: &str) -> Holder {
        let lease = LEASE.as_millis().to_string();
        let store = self.postgres.url();
        let mut child = Command::new(program("holder"))
            .args([locks, &store, &lease, "k", step])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the example `holder` is built beside the tests");
        let output = BufReader::new(child.stdout.take().unwrap());
        let input = child.stdin.take().unwrap();
        Holder { child, input, output }
    }

    /// Adds one as somebody else would, and says how long that took.
    async fn add_one(&self) -> Duration {
        let started = Instant::now();
        self.coordinator
            .run(["k"], async |tx| {
                let db = tx.enlist(&self.bank).await?;
                let add = "UPDATE account SET cents = cents + 1 WHERE name = 'k'";
                sqlx::query(add).execute(&db).await?;
                Ok::<_, Error>(())
            })
            .await
            .unwrap();
        started.elapsed()
    }

    async fn cents(&self) -> i64 {
        let read = "SELECT cents FROM account WHERE name = 'k'";
        sqlx::query_scalar(read).fetch_one(self.bank.pool()).await.unwrap()
    }
}

struct Holder {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Holder {
    fn reads(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    fn tell(&mut self, command: &str) -> String {
        writeln!(self.input, "{command}").unwrap();
        self.reads()
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_holder_was_killed_others_go_on_within_one_lease() {
    let b = Bench::new().await;
    for step in ["lock", "write"] {
        let mut holder = b.start(step);
        holder.reads();
        holder.signal("-KILL");
        let took = b.add_one().await;
        assert!(took < LEASE + SLACK, "{step}: {took:?}");
    }
    assert_eq!(b.cents().await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_was_stopped_is_overtaken_within_one_lease_and_commits_nothing() {
    let b = Bench::new().await;
    for step in ["lock", "write"] {
        let before = b.cents().await;
        let mut holder = b.start(step);
        holder.reads();
        holder.signal("-STOP");
        let took = b.add_one().await;
        assert!(took < LEASE + SLACK, "{step}: {took:?}, in the store too");
        holder.signal("-CONT");
        let written = if step == "lock" { holder.tell("write") } else { "written".to_owned() };
        let committed = holder.tell("commit");
        assert_ne!(committed, "committed", "{step}: after {written}");
        assert_ne!(committed, "InDoubt", "{step}: after {written}");
        assert_eq!(b.cents().await, before + 1, "{step}: {written}, {committed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiter_that_was_killed_or_stopped_delays_those_behind_it_by_less_than_a_lease() {
    let b = Bench::new().await;
    for signal in ["-KILL", "-STOP"] {
        let guard = b.coordinator.locks().lock("k").ttl(LEASE).acquire().await.unwrap();
        let mut waiter = b.start("wait");
        assert_eq!(waiter.reads(), "waiting");
        waiter.signal(signal);
        let next = tokio::spawn(b.coordinator.transaction(["k"]).begin());
        let waiters = async || b.coordinator.locks().inspect("k").await.unwrap().waiters.len();
        crate::support::wait_until("both wait", SLACK, async || waiters().await == 2).await;
        guard.release().await.unwrap();
        let started = Instant::now();
        let tx = next.await.unwrap().unwrap();
        assert!(started.elapsed() < LEASE + SLACK, "{signal}: {:?}", started.elapsed());
        tx.rollback().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_holder_that_only_thinks_for_several_leases_keeps_lock_and_branch() {
    let b = Bench::new().await;
    let mut holder = b.start("write");
    assert_eq!(holder.reads(), "written");
    tokio::time::sleep(LEASE * 3).await;
    assert_eq!(holder.tell("commit"), "committed");
    assert_eq!(b.cents().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_was_restarted_empty_costs_a_retry_and_no_update() {
    let b = Bench::new().await;
    let mut holder = b.start("write");
    assert_eq!(holder.reads(), "written");
    b.redis.restart_empty();
    let took = b.add_one().await;
    assert!(took < LEASE + SLACK, "{took:?}");
    assert_ne!(holder.tell("commit"), "committed");
    assert_eq!(b.cents().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_stops_with_nothing_but_the_rows_is_waited_for_and_commits_nothing() {
    let b = Bench::new().await;
    let proxy = Proxy::start(b.redis.port()).await;
    let mut holder = b.start_on(&format!("redis://127.0.0.1:{}", proxy.port()), "degraded");
    assert_eq!(holder.reads(), "connected");
    proxy.sever(true);
    assert_eq!(holder.tell("begin"), "written");
    holder.signal("-STOP");
    // Whoever still has the lock service has a far higher token, and yet ends nobody's session.
    let took = b.add_one().await;
    assert!(took > LEASE / 3 && took < LEASE + SLACK * 2, "{took:?}");
    holder.signal("-CONT");
    let committed = holder.tell("commit");
    assert!(["Conflict", "Aborted"].contains(&committed.as_str()), "{committed}");
    assert_eq!(b.cents().await, 1);
}
