//! One client of locks and store: a worker process, or the rival in the conductor.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use palisade::{Coordinator, Error, ErrorKind, Locks};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::Operation;
use super::store::{COUNTERS, Store};
use crate::history::{History, Outcome};
use crate::worker::{Order, Seam, Settings, Word, say};
use crate::{Result, clock};

/// How long to wait for a key.
const WAIT: Duration = Duration::from_secs(5);
/// How long the last operation of a task waits for one: it must succeed on a busy machine too.
const LAST_WAIT: Duration = Duration::from_secs(30);
/// The longest thought.
const THINK: Duration = Duration::from_secs(1);
/// How long to wait after an operation that failed, so that an outage is not a busy loop.
const PAUSE: Duration = Duration::from_millis(20);

pub struct Client {
    settings: Settings,
    fenced: bool,
    locks: Locks,
    coordinator: Coordinator,
    store: Store,
    history: History,
    seam: Seam,
    /// Where a stopped process with a branch open would keep all others out of the store, it stops
    /// itself only while it has none.
    branches: Option<tokio::sync::Mutex<()>>,
    count: AtomicU64,
    ending: AtomicBool,
}

/// How an operation spends its time.
#[derive(Clone, Copy, Default)]
struct Thoughts {
    before_branch: Duration,
    in_branch: Duration,
}

/// The whole life of a worker process of W1.
pub async fn worker(
    settings: Settings,
    fenced: bool,
    mut orders: UnboundedReceiver<Order>,
) -> Result<()> {
    let client = Arc::new(Client::open(settings, fenced).await?);
    let mut tasks = JoinSet::new();
    for task in 0..client.settings.tasks {
        let random = fastrand::Rng::with_seed(client.settings.seed ^ task as u64);
        tasks.spawn(Arc::clone(&client).work(random));
    }
    say(&Word::Ready);
    while let Some(order) = orders.recv().await {
        match order {
            Order::Stop => client.seam.arm(true),
            Order::Last => break,
            Order::Hold | Order::Forget | Order::Cut | Order::Heal => {}
        }
    }
    client.seam.arm(false);
    client.ending.store(true, Ordering::SeqCst);
    tasks.join_all().await;
    Ok(())
}

impl Client {
    pub async fn open(settings: Settings, fenced: bool) -> Result<Self> {
        let store = Store::open(&settings.store, settings.tasks).await?;
        let locks = settings.connect().await?;
        let coordinator = store.coordinator(locks.clone(), settings.lease, WAIT);
        let branches = matches!(store, Store::Sqlite(_)).then(tokio::sync::Mutex::default);
        Ok(Self {
            history: settings.history()?,
            settings,
            fenced,
            locks,
            coordinator,
            store,
            seam: Seam::default(),
            branches,
            count: AtomicU64::new(0),
            ending: AtomicBool::new(false),
        })
    }

    async fn work(self: Arc<Self>, mut random: fastrand::Rng) {
        let (prefix, _) = self.settings.name.split_once('-').unwrap();
        while !self.ending.load(Ordering::SeqCst) {
            let key = format!("{prefix}-{}", random.usize(..COUNTERS));
            let think = THINK.mul_f64(random.f64());
            // One that keeps the others out of the store does not think there.
            let share = if self.branches.is_some() { 1.0 } else { random.f64() };
            let before_branch = think.mul_f64(share);
            let thoughts = Thoughts { before_branch, in_branch: think - before_branch };
            if !self.add(&key, thoughts).await {
                sleep(PAUSE).await;
            }
        }
        let key = format!("{prefix}-{}", random.usize(..COUNTERS));
        self.add_last(&key).await;
    }

    /// Adds one to `key` without a thought; whether that is known to have worked.
    pub async fn take(&self, key: &str) -> bool {
        self.add(key, Thoughts::default()).await
    }

    async fn add(&self, key: &str, thoughts: Thoughts) -> bool {
        let mut operation = self.operation(key, false);
        let answer = if self.fenced {
            self.add_fenced(&mut operation, thoughts).await
        } else {
            self.add_plainly(&mut operation, thoughts).await
        };
        operation.ends(answer);
        self.history.note(&operation);
        operation.outcome == Outcome::Ok
    }

    fn operation(&self, key: &str, last: bool) -> Operation {
        let number = self.count.fetch_add(1, Ordering::SeqCst);
        Operation::new(format!("{}-{number}", self.settings.name), key, last)
    }

    async fn add_fenced(
        &self,
        operation: &mut Operation,
        thoughts: Thoughts,
    ) -> palisade::Result<()> {
        let tx = self.coordinator.transaction([&operation.key]).begin().await?;
        self.granted(operation, tx.held()[0].token.get(), tx.owner().to_string());
        self.think(operation, thoughts.before_branch).await;
        let _alone = match &self.branches {
            Some(branches) => Some(branches.lock().await),
            None => None,
        };
        match self.store.add_fenced(&tx, operation, thoughts.in_branch).await {
            Ok(()) => tx.commit().await,
            // The rollback cannot change the outcome, unless it finds that it is not known.
            Err(error) => match tx.rollback().await {
                Err(doubt) if doubt.is_in_doubt() => Err(doubt),
                _ => Err(error),
            },
        }
    }

    /// The same with a lock and an ordinary transaction. It looks whether it still holds the lock
    /// right before it writes, as a careful program does; only the fence is missing.
    async fn add_plainly(
        &self,
        operation: &mut Operation,
        thoughts: Thoughts,
    ) -> palisade::Result<()> {
        let wait = if operation.last { LAST_WAIT } else { WAIT };
        let request = self.locks.lock(&operation.key).ttl(self.settings.lease).wait(wait);
        let guard = request.acquire().await?;
        self.granted(operation, guard.token().get(), guard.owner().to_string());
        operation.reads(self.store.read(&operation.key).await?);
        self.think(operation, thoughts.before_branch + thoughts.in_branch).await;
        if !guard.is_held() {
            let detail = "the lock was lost before the write";
            return Err(Error::new(ErrorKind::LeaseLost, "control", detail));
        }
        let _alone = match &self.branches {
            Some(branches) => Some(branches.lock().await),
            None => None,
        };
        self.store.write_plainly(operation).await?;
        // A lock that was lost meanwhile does not undo the write.
        let _ = guard.release().await;
        Ok(())
    }

    fn granted(&self, operation: &mut Operation, token: u64, owner: String) {
        operation.granted = Some(clock::now());
        operation.token = Some(token);
        operation.owner = Some(owner);
        self.history.note(operation);
    }

    /// Thinks, or stops the process for as long as the nemesis likes; then it has thought enough.
    async fn think(&self, operation: &Operation, time: Duration) {
        if !self.seam.is_due() {
            return sleep(time).await;
        }
        let _alone = match &self.branches {
            Some(branches) => Some(branches.lock().await),
            None => None,
        };
        self.seam.stop(&operation.key);
    }

    /// The last operation of a task: everything is healed, so it must succeed, in as many attempts
    /// as `run` makes.
    async fn add_last(&self, key: &str) {
        let operation = std::sync::Mutex::new(self.operation(key, true));
        let answer = loop {
            let answer = self.try_last(key, &operation).await;
            // Right after an outage the client may refuse by itself.
            match &answer {
                Err(error) if error.retry_after().is_some() => sleep(PAUSE).await,
                _ => break answer,
            }
        };
        let mut operation = operation.into_inner().unwrap();
        operation.ends(answer);
        self.history.note(&operation);
    }

    async fn try_last(
        &self,
        key: &str,
        operation: &std::sync::Mutex<Operation>,
    ) -> palisade::Result<()> {
        if self.fenced {
            let work = async |tx: palisade::Tx| {
                let mut attempt = operation.lock().unwrap().clone();
                attempt.token = Some(tx.held()[0].token.get());
                attempt.owner = Some(tx.owner().to_string());
                let answer = self.store.add_fenced(&tx, &mut attempt, Duration::ZERO).await;
                *operation.lock().unwrap() = attempt;
                answer
            };
            self.coordinator.transaction([key]).wait(LAST_WAIT).run(work).await
        } else {
            let mut attempt = operation.lock().unwrap().clone();
            let answer = self.add_plainly(&mut attempt, Thoughts::default()).await;
            *operation.lock().unwrap() = attempt;
            answer
        }
    }
}
