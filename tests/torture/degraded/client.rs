//! A worker of W11.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use palisade::backend::{LockBackend, MemoryBackend, RedisBackend, RedisOptions};
use palisade::{Coordinator, Fallback, LockOptions, Locks, Tx};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::{BUDGET, KEYS, Refusal};
use crate::Result;
use crate::counter::Operation;
use crate::counter::store::Store;
use crate::history::{History, Outcome};
use crate::support::Cuttable;
use crate::worker::{Order, Settings, Word, say};

/// How long to wait for a key, and for its rows.
const WAIT: Duration = Duration::from_secs(20);
/// The longest thought between a read and its write.
const THINK: Duration = Duration::from_millis(60);
/// How long to wait after an operation that failed.
const PAUSE: Duration = Duration::from_millis(20);
/// How often the budget of those without a fallback is tried.
const PROBE: Duration = Duration::from_millis(100);
/// When a driver reports an outage; the call ends then, or with the wait of the request.
const SOON: Duration = Duration::from_millis(300);

struct Client {
    settings: Settings,
    store: Store,
    history: History,
    refusals: History,
    count: AtomicU64,
    cut: AtomicBool,
    /// How often the worker was cut off or healed.
    turns: AtomicU64,
    ending: AtomicBool,
}

/// The whole life of a worker process of W11.
pub async fn worker(
    settings: Settings,
    fenced: bool,
    is_cut: bool,
    mut orders: UnboundedReceiver<Order>,
) -> Result<()> {
    let mut store = Store::open_with(&settings.store, 2 * settings.tasks as u32 + 4).await?;
    if !fenced {
        store = store.without_store_fence()?;
    }
    let client = Arc::new(Client {
        history: settings.history()?,
        refusals: History::open(&settings.directory, &format!("refusals-{}", settings.name))?,
        store,
        settings,
        count: AtomicU64::new(0),
        cut: AtomicBool::new(false),
        turns: AtomicU64::new(0),
        ending: AtomicBool::new(false),
    });
    let wires = client.wires().await?;
    let mut tasks = JoinSet::new();
    for task in 0..client.settings.tasks {
        let random = fastrand::Rng::with_seed(client.settings.seed ^ task as u64);
        let way = Way {
            coordinator: client.coordinator(&wires, task),
            falls_back: is_cut && task % wires.locks.len() == 0,
        };
        tasks.spawn(Arc::clone(&client).work(way, random));
    }
    tasks.spawn(Arc::clone(&client).probe(client.coordinator(&wires, 0)));
    say(&Word::Ready);
    while let Some(order) = orders.recv().await {
        match order {
            Order::Cut | Order::Heal => client.turn(&wires, order == Order::Cut),
            Order::Last => break,
            Order::Stop | Order::Hold | Order::Forget => {}
        }
    }
    client.ending.store(true, Ordering::SeqCst);
    tasks.join_all().await;
    Ok(())
}

/// The lock service as the tasks of a worker reach it.
struct Wires {
    locks: Vec<Locks>,
    /// What can be cut in this very process, if that is where the locks are.
    cuttable: Option<Arc<Cuttable>>,
}

/// How a task comes by its keys.
struct Way {
    coordinator: Coordinator,
    /// Whether it will be cut off. The others have no branch before they read.
    falls_back: bool,
}

impl Client {
    /// Through the network all tasks go one way; in memory every other one can be cut off.
    async fn wires(&self) -> Result<Wires> {
        if self.settings.locks != "memory:" {
            let options = RedisOptions { reconnect_for: SOON, ..RedisOptions::default() };
            let started = Instant::now();
            let backend = loop {
                // On a busy machine the first answer takes longer.
                match RedisBackend::connect(&self.settings.locks, options.clone()).await {
                    Err(error) if error.is_unavailable() && started.elapsed() < WAIT => {}
                    answer => break answer?,
                }
            };
            return Ok(Wires { locks: vec![locks(Arc::new(backend)).await?], cuttable: None });
        }
        let memory = Arc::new(MemoryBackend::new());
        let cuttable = Cuttable::new(Arc::clone(&memory));
        let all = vec![locks(Arc::clone(&cuttable) as _).await?, locks(memory).await?];
        Ok(Wires { locks: all, cuttable: Some(cuttable) })
    }

    fn coordinator(&self, wires: &Wires, task: usize) -> Coordinator {
        let locks = wires.locks[task % wires.locks.len()].clone();
        self.store.coordinator(locks, self.settings.lease, WAIT)
    }

    fn turn(&self, wires: &Wires, cut: bool) {
        self.turns.fetch_add(1, Ordering::SeqCst);
        self.cut.store(cut, Ordering::SeqCst);
        if let Some(cuttable) = &wires.cuttable {
            cuttable.cut(cut);
        }
    }

    async fn work(self: Arc<Self>, way: Way, mut random: fastrand::Rng) {
        let (prefix, _) = self.settings.name.split_once('-').unwrap();
        let prefix = prefix.to_owned();
        loop {
            let last = self.ending.load(Ordering::SeqCst);
            let key = format!("{prefix}-{}", random.usize(..KEYS));
            let think = if last { Duration::ZERO } else { THINK.mul_f64(random.f64()) };
            let done = self.add(&way, &key, think, last).await;
            if last {
                return;
            }
            if !done {
                sleep(PAUSE).await;
            }
        }
    }

    /// Adds one to `key`, whether or not there are locks to be had; whether that is known to have
    /// worked. The last of a task must, in as many attempts as `run` makes.
    async fn add(&self, way: &Way, key: &str, think: Duration, last: bool) -> bool {
        let number = self.count.fetch_add(1, Ordering::SeqCst);
        let id = format!("{}-{number}", self.settings.name);
        let operation = std::sync::Mutex::new(Operation::new(id, key, last));
        let mut request = way.coordinator.transaction([key]);
        if way.falls_back {
            request = self.store.falling_back(request);
        }
        let answer = if last {
            let work = async |tx: Tx| self.attempt(&tx, &operation, think).await;
            request.run(work).await
        } else {
            match request.begin().await {
                Ok(tx) => match self.attempt(&tx, &operation, think).await {
                    Ok(()) => tx.commit().await,
                    // The rollback cannot change the outcome, unless it finds that it is unknown.
                    Err(error) => match tx.rollback().await {
                        Err(doubt) if doubt.is_in_doubt() => Err(doubt),
                        _ => Err(error),
                    },
                },
                Err(error) => Err(error),
            }
        };
        let mut operation = operation.into_inner().unwrap();
        operation.ends(answer);
        self.history.note(&operation);
        operation.outcome == Outcome::Ok
    }

    async fn attempt(
        &self,
        tx: &Tx,
        operation: &std::sync::Mutex<Operation>,
        think: Duration,
    ) -> palisade::Result<()> {
        let mut attempt = operation.lock().unwrap().clone();
        attempt.granted = Some(crate::clock::now());
        attempt.degraded = tx.is_degraded();
        attempt.token = Some(tx.held()[0].token.get());
        attempt.owner = Some(tx.owner().to_string());
        let answer = self.store.add_in_two_steps(tx, &mut attempt, think).await;
        *operation.lock().unwrap() = attempt;
        answer
    }

    /// Begins without a fallback now and then, on a key of its own, and notes how it is told of an
    /// outage.
    async fn probe(self: Arc<Self>, coordinator: Coordinator) {
        let key = format!("probe of {}", self.settings.name);
        while !self.ending.load(Ordering::SeqCst) {
            sleep(PROBE).await;
            let (turns, cut) = (self.turns.load(Ordering::SeqCst), self.cut.load(Ordering::SeqCst));
            let started = Instant::now();
            let request = coordinator.transaction([&key]).wait(BUDGET).fallback(Fallback::Fail);
            let answer = request.begin().await;
            let took = started.elapsed();
            // One that has met a switch says nothing about either side of it.
            if cut && turns == self.turns.load(Ordering::SeqCst) {
                let named = answer.as_ref().is_err_and(palisade::Error::is_unavailable);
                self.refusals.note(&Refusal { took, named });
            }
            if let Ok(tx) = answer {
                let _ = tx.rollback().await;
            }
        }
    }
}

async fn locks(backend: Arc<dyn LockBackend>) -> Result<Locks> {
    Ok(Locks::with_options(backend, LockOptions::default()).await?)
}
