//! Clients that do at random what a lock allows, and write down what they were told.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fastrand::Rng;
use palisade::{Error, ErrorKind, Lease, LockGuard, LockOptions, Locks, OwnerId};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::checker::Operation;
use super::models::{Acquired, Act, Released};

/// Tasks of each service, two for each owner.
const TASKS: usize = 4;
/// How many keys the tasks meet at.
const KEYS: usize = 2;
/// After so many steps a task goes on to other keys: short histories are quickly checked, however
/// much in them is unknown.
const STEPS_AT_A_KEY: usize = 12;

/// What the clients of a history do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub seed: u64,
    /// How much each task does.
    pub steps: usize,
    /// The most entries of one owner.
    pub limit: usize,
    pub lease: Duration,
    pub call_timeout: Duration,
    /// The longest that a task waits, save for its last operations.
    pub patience: Duration,
    /// Whether leases may run out.
    pub lapses: bool,
}

impl Plan {
    /// Nothing goes wrong, and no lease ends before the history does.
    pub fn new(seed: u64, steps: usize, limit: usize) -> Self {
        let (lease, call_timeout) = (Duration::from_secs(600), Duration::from_secs(20));
        // Short enough for some to wait in vain.
        let patience = Duration::from_millis(60);
        Self { seed, steps, limit, lease, call_timeout, patience, lapses: false }
    }

    pub fn options(&self) -> LockOptions {
        let mut options = LockOptions::default();
        (options.lease, options.call_timeout) = (self.lease, self.call_timeout);
        options.max_entries = u32::try_from(self.limit).unwrap();
        // A history of requests that were not sent says nothing.
        options.breaker.enabled = false;
        options
    }
}

/// What was written down, one history for each key.
#[derive(Debug)]
pub struct Record {
    started: Instant,
    plan: Plan,
    histories: Mutex<BTreeMap<String, Vec<Operation>>>,
    owners: Mutex<Vec<OwnerId>>,
    entries: AtomicUsize,
}

impl Record {
    pub fn new(plan: Plan) -> Arc<Self> {
        Arc::new(Self {
            started: Instant::now(),
            plan,
            histories: Mutex::default(),
            owners: Mutex::default(),
            entries: AtomicUsize::new(0),
        })
    }

    /// Runs the clients of all services to their end.
    pub async fn run(self: &Arc<Self>, services: &[Locks]) {
        let mut tasks = JoinSet::new();
        for (service, locks) in services.iter().enumerate() {
            let owners = [locks.owner(), locks.owner()];
            for task in 0..TASKS {
                let number = u64::try_from(service * TASKS + task).unwrap();
                let client = Client {
                    record: Arc::clone(self),
                    locks: locks.clone(),
                    shared: owners[task % owners.len()],
                    owner: owners[task % owners.len()],
                    random: Rng::with_seed(self.plan.seed ^ (number << 48)),
                    held: Vec::new(),
                    key: String::new(),
                };
                tasks.spawn(client.run());
            }
        }
        tasks.join_all().await;
    }

    /// Every service gets every key in the end.
    pub async fn last_operations(self: &Arc<Self>, services: &[Locks]) {
        let keys: Vec<_> = self.histories.lock().unwrap().keys().cloned().collect();
        for locks in services {
            for key in keys.clone() {
                let owner = locks.owner();
                let mut client = Client {
                    record: Arc::clone(self),
                    locks: locks.clone(),
                    shared: owner,
                    owner,
                    random: Rng::with_seed(0),
                    held: Vec::new(),
                    key,
                };
                client.acquire(Some(Duration::from_secs(60))).await;
                assert_eq!(client.held.len(), 1, "the last acquire of {} fails", client.key);
                client.release(0).await;
            }
        }
    }

    /// The histories, and how often each answer was given.
    pub fn finish(self: Arc<Self>) -> (Vec<Vec<Operation>>, BTreeMap<String, usize>) {
        let histories: Vec<_> =
            std::mem::take(&mut *self.histories.lock().unwrap()).into_values().collect();
        let mut answers = BTreeMap::new();
        for operation in histories.iter().flatten() {
            let name = match &operation.act {
                Act::Acquire { answer: Acquired::Granted(_), .. } => "granted".to_owned(),
                Act::Acquire { answer, .. } => format!("acquire {answer:?}"),
                Act::Release { answer, .. } => format!("release {answer:?}"),
                Act::Inspect(Some((_, 2.., _))) => "seen re-entered".to_owned(),
                Act::Inspect(_) => "seen".to_owned(),
                Act::Lapse { .. } => continue,
            };
            *answers.entry(name).or_default() += 1;
        }
        (histories, answers)
    }

    fn now(&self) -> u128 {
        self.started.elapsed().as_nanos()
    }

    fn owner(&self, owner: OwnerId) -> usize {
        let mut owners = self.owners.lock().unwrap();
        owners.iter().position(|known| *known == owner).unwrap_or_else(|| {
            owners.push(owner);
            owners.len() - 1
        })
    }

    fn write(&self, key: &str, act: Act, invoked: u128, returned: Option<u128>) {
        let mut histories = self.histories.lock().unwrap();
        histories.entry(key.to_owned()).or_default().push(Operation { act, invoked, returned });
    }
}

/// One task. It works at one key until it holds nothing there.
struct Client {
    record: Arc<Record>,
    locks: Locks,
    /// The owner that another task asks as, too.
    shared: OwnerId,
    /// Who asks now.
    owner: OwnerId,
    random: Rng,
    key: String,
    held: Vec<(usize, LockGuard)>,
}

impl Client {
    async fn run(mut self) {
        let plan = self.record.plan;
        for step in 0..plan.steps {
            if self.held.is_empty() {
                self.key = format!("{}-{}", step / STEPS_AT_A_KEY, self.random.usize(..KEYS));
            }
            // Holders think, so that others meet them.
            sleep(Duration::from_micros(self.random.u64(..3_000))).await;
            let wait = plan.patience.mul_f64(self.random.f64()).max(Duration::from_millis(1));
            let any = self.random.usize(..self.held.len().max(1));
            match (self.random.u8(..100), self.held.is_empty()) {
                (0..10, _) => self.inspect().await,
                (10..60, true) | (10..30, false) => self.acquire(Some(wait)).await,
                (_, true) | (30..45, false) => self.acquire(None).await,
                (45..95, false) => self.release(any).await,
                (_, false) => self.drop_one(any),
            }
        }
        while !self.held.is_empty() {
            self.release(0).await;
        }
    }

    /// Waits for the key, or only tries.
    async fn acquire(&mut self, wait: Option<Duration>) {
        let (record, key) = (Arc::clone(&self.record), self.key.clone());
        // An owner that nobody else knows may get its lock from another request of its service.
        let fresh = self.held.is_empty() && self.random.bool();
        if self.held.is_empty() {
            self.owner = if fresh { self.locks.owner() } else { self.shared };
        }
        let owner = record.owner(self.owner);
        let entry = record.entries.fetch_add(1, Ordering::SeqCst);
        let request = self.locks.lock(&key);
        let request = match fresh {
            true => request.new_owner(self.owner),
            false => request.owner(self.owner),
        };
        let invoked = record.now();
        let answer = match wait {
            Some(wait) => request.wait(wait).acquire().await,
            None => request.wait(Duration::ZERO).acquire().await,
        };
        let returned = record.now();
        let act = |answer| Act::Acquire { owner, entry, answer };
        let answer = match answer {
            Ok(guard) => {
                let token = guard.token().get();
                self.held.push((entry, guard));
                self.lapses(entry, invoked, returned);
                Acquired::Granted(token)
            }
            Err(error) => match refused(&error) {
                Some(answer) => answer,
                None => return,
            },
        };
        if answer == Acquired::Unknown {
            record.write(&key, act(answer), invoked, None);
            record.write(&key, unanswered(owner, entry), invoked, None);
        } else {
            record.write(&key, act(answer), invoked, Some(returned));
        }
    }

    /// Where leases may run out, this one may, from its shortest length on; and one that the client
    /// never heard of may have, while it waited for longer than that.
    fn lapses(&self, entry: usize, invoked: u128, returned: u128) {
        let Record { plan, entries, .. } = &*self.record;
        if !plan.lapses {
            return;
        }
        // What is passed on within a service lasts for a tenth of a claim at least.
        let shortest = Lease::new(plan.lease).unwrap().claim().as_nanos() / 10;
        self.record.write(&self.key, Act::Lapse { entry }, invoked + shortest, None);
        if returned - invoked > shortest {
            let (owner, entry) =
                (self.record.owner(self.owner), entries.fetch_add(1, Ordering::SeqCst));
            let unheard = Act::Acquire { owner, entry, answer: Acquired::Unknown };
            self.record.write(&self.key, unheard, invoked, None);
            self.record.write(&self.key, Act::Lapse { entry }, invoked + shortest, None);
        }
    }

    async fn release(&mut self, index: usize) {
        let (entry, guard) = self.held.swap_remove(index);
        let owner = self.record.owner(self.owner);
        let invoked = self.record.now();
        let released = guard.release().await;
        let returned = self.record.now();
        let answer = match released.as_ref().map_err(Error::kind) {
            Ok(()) => Released::Done,
            Err(ErrorKind::LeaseLost) => Released::Gone,
            Err(ErrorKind::Unavailable) => Released::Unknown,
            Err(kind) => panic!("{kind:?}"),
        };
        let returned = (answer != Released::Unknown).then_some(returned);
        self.record.write(&self.key, Act::Release { owner, entry, answer }, invoked, returned);
    }

    /// The watchdog releases it.
    fn drop_one(&mut self, index: usize) {
        let (entry, guard) = self.held.swap_remove(index);
        let invoked = self.record.now();
        drop(guard);
        let owner = self.record.owner(self.owner);
        self.record.write(&self.key, unanswered(owner, entry), invoked, None);
    }

    async fn inspect(&mut self) {
        let invoked = self.record.now();
        let seen = self.locks.inspect(&self.key).await;
        let returned = self.record.now();
        let Ok(seen) = seen else { return };
        if seen.holders.iter().any(|holder| holder.owner.is_group()) {
            // The service does not know who of the group holds it.
            return;
        }
        let first = seen.holders.first().map(|holder| {
            let same = |other: &palisade::protocol::Holder| {
                (other.owner, other.token) == (holder.owner, holder.token)
            };
            assert!(seen.holders.iter().all(same), "several holders: {seen:?}");
            (self.record.owner(holder.owner), seen.holders.len(), holder.token.get())
        });
        self.record.write(&self.key, Act::Inspect(first), invoked, Some(returned));
    }
}

fn unanswered(owner: usize, entry: usize) -> Act {
    Act::Release { owner, entry, answer: Released::Unknown }
}

/// What an error says about the lock; nothing, where the client refused by itself.
fn refused(error: &Error) -> Option<Acquired> {
    match error.kind() {
        ErrorKind::Busy => Some(Acquired::Busy),
        ErrorKind::LimitReached => Some(Acquired::LimitReached),
        // In line until the end of the wait: it may have been granted just before it was cancelled.
        ErrorKind::TimedOut | ErrorKind::Unavailable | ErrorKind::LeaseLost => {
            Some(Acquired::Unknown)
        }
        ErrorKind::WouldDeadlock => None,
        kind => panic!("{kind:?}: {error}"),
    }
}
