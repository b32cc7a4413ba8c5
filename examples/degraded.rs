//! Business goes on while the lock service is away: on the fence rows, on another lock service, or
//! by a decision of the program's own.
//!
//! ```sh
//! cargo run --example degraded
//! ```
//!
//! With a `redis-server` in the path, the outage is real: a server is started, killed, and started
//! again. Without one, the locks are in memory behind a wire that can be cut.

use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use palisade::backend::{Capabilities, LockBackend, MemoryBackend, Sink};
use palisade::protocol::{Acquire, Acquired, Inspection, Part, Released, Renewal, Renewed};
use palisade::{
    ClientId, Coordinator, Error, ErrorKind, Fallback, LockOptions, Locks, Partition, ResourceKey,
    Result, SqlStore, Tx,
};
use sqlx::Sqlite;
use sqlx::sqlite::SqlitePoolOptions;
use tokio::time::sleep;

const TABLE: &str = "CREATE TABLE stock (item TEXT PRIMARY KEY, pieces INT);
                     INSERT INTO stock VALUES ('pen', 100);";

#[tokio::main]
async fn main() -> Result<()> {
    let pool = SqlitePoolOptions::new().max_connections(1).connect("sqlite::memory:").await?;
    sqlx::raw_sql(TABLE).execute(&pool).await?;
    let shop = SqlStore::new("shop", pool);
    shop.migrate().await?;

    let mut service = Service::start().await?;
    let coordinator = Coordinator::builder(service.locks.clone())
        .store(&shop)
        .fallback(Fallback::StoreFence)
        .build();

    sell(&coordinator, &shop, "as usual").await?;
    service.go_down();
    sell(&coordinator, &shop, "nobody answers, so the fence rows are the locks").await?;
    sell(&coordinator, &shop, "and again").await?;

    // Each transaction may choose for itself.
    let refused = coordinator.transaction(["stock:pen"]).fallback(Fallback::Fail).begin().await;
    println!("whoever must not go on: {}", refused.unwrap_err());
    let spare = Fallback::backend(palisade::connect("memory:").await?);
    let tx = coordinator.transaction(["stock:pen"]).fallback(spare).begin().await?;
    println!("another lock service: degraded {}, token {}", tx.is_degraded(), tx.held()[0].token);
    tx.rollback().await?;
    let outbox = Fallback::handler(async |outage| {
        println!("a handler: {:?} go to the outbox, because {}", outage.keys, outage.cause);
        Ok(())
    });
    let tx = coordinator.transaction(["mail:7"]).fallback(outbox).begin().await?;
    assert!(tx.is_degraded() && tx.held().is_empty());
    tx.commit().await?;

    service.come_back().await?;
    sell(&coordinator, &shop, "the lock service is back, and its tokens are higher").await?;
    let left: i64 = sqlx::query_scalar("SELECT pieces FROM stock").fetch_one(shop.pool()).await?;
    println!("{left} pens are left");
    assert_eq!(left, 96, "each was sold once");
    Ok(())
}

/// One piece of business. It does not have to know how it came by its keys.
async fn sell(coordinator: &Coordinator, shop: &SqlStore<Sqlite>, when: &str) -> Result<()> {
    let work = async |tx: Tx| {
        let db = tx.enlist(shop).await?;
        let sell = "UPDATE stock SET pieces = pieces - 1 WHERE item = 'pen'";
        sqlx::query(sell).execute(&db).await?;
        let how = if tx.is_degraded() { "degraded" } else { "locked" };
        println!("sold a pen, {how}, token {}: {when}", tx.held()[0].token);
        Ok::<_, Error>(())
    };
    coordinator.transaction(["stock:pen"]).stores([shop]).run(work).await
}

/// A lock service that this program can take away.
struct Service {
    locks: Locks,
    outage: Outage,
}

enum Outage {
    Redis { server: Child, port: u16 },
    Wire(Arc<Wire>),
}

impl Service {
    async fn start() -> Result<Self> {
        let mut options = LockOptions::default();
        // Whoever has something else to turn to does not wait long for an answer.
        options.call_timeout = Duration::from_millis(300);
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|at| at.local_addr());
        let port = free.expect("a free port").port();
        if let Ok(server) = redis_server(port) {
            println!("a Redis of our own, on port {port}");
            let outage = Outage::Redis { server, port };
            let locks = reach(port, options).await?;
            return Ok(Self { locks, outage });
        }
        println!("there is no redis-server here: locks in memory, behind a wire");
        let wire = Arc::new(Wire { locks: MemoryBackend::new(), cut: AtomicBool::new(false) });
        let locks = Locks::with_options(Arc::clone(&wire) as _, options).await?;
        Ok(Self { locks, outage: Outage::Wire(wire) })
    }

    fn go_down(&mut self) {
        match &mut self.outage {
            Outage::Redis { server, .. } => {
                server.kill().and_then(|()| server.wait()).expect("it is killed");
            }
            Outage::Wire(wire) => wire.cut.store(true, Ordering::Relaxed),
        }
    }

    async fn come_back(&mut self) -> Result<()> {
        match &mut self.outage {
            Outage::Redis { server, port } => {
                *server = redis_server(*port).expect("it starts again");
                reach(*port, LockOptions::default()).await?;
            }
            Outage::Wire(wire) => wire.cut.store(false, Ordering::Relaxed),
        }
        while self.locks.lock("is it back?").try_acquire().await.is_err() {
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.go_down();
    }
}

fn redis_server(port: u16) -> std::io::Result<Child> {
    let mut command = Command::new("redis-server");
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""]);
    command.stdout(Stdio::null()).spawn()
}

/// Connects as soon as the server answers.
async fn reach(port: u16, options: LockOptions) -> Result<Locks> {
    let url = format!("redis://127.0.0.1:{port}");
    for _ in 0..100 {
        if let Ok(locks) = palisade::connect_with(&url, options).await {
            return Ok(locks);
        }
        sleep(Duration::from_millis(50)).await;
    }
    palisade::connect_with(&url, options).await
}

/// A lock service of one's own is anything that implements the trait: here, one that can be cut
/// off.
#[derive(Debug)]
struct Wire {
    locks: MemoryBackend,
    cut: AtomicBool,
}

impl Wire {
    fn far_end(&self) -> Result<&MemoryBackend> {
        if self.cut.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Unavailable, "call", "the wire is cut"));
        }
        Ok(&self.locks)
    }
}

#[async_trait::async_trait]
impl LockBackend for Wire {
    fn capabilities(&self) -> Capabilities {
        self.locks.capabilities()
    }
    async fn subscribe(&self, client: ClientId, sink: Sink) -> Result<()> {
        self.far_end()?.subscribe(client, sink).await
    }
    fn unsubscribe(&self, client: ClientId) {
        self.locks.unsubscribe(client);
    }
    async fn acquire(&self, ask: &Acquire) -> Result<Acquired> {
        self.far_end()?.acquire(ask).await
    }
    async fn renew(&self, at: Partition, renewals: &[Renewal]) -> Result<Vec<Renewed>> {
        self.far_end()?.renew(at, renewals).await
    }
    async fn release(&self, part: &Part) -> Result<Released> {
        self.far_end()?.release(part).await
    }
    async fn cancel(&self, part: &Part) -> Result<()> {
        self.far_end()?.cancel(part).await
    }
    async fn inspect(&self, at: Partition, key: &ResourceKey) -> Result<Inspection> {
        self.far_end()?.inspect(at, key).await
    }
    async fn ping(&self) -> Result<()> {
        self.far_end()?.ping().await
    }
}
