//! Locks within one process.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use tokio::time::Instant;

use super::{Capabilities, LockBackend, Push, Sink};
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{
    Acquire, Acquired, Corrupt, Inspection, Part, Queue, Released, Renewal, Renewed,
};
use crate::types::{ClientId, Partition, ResourceKey};

/// How often entries that lapsed on keys nobody asks for any more are cleared away.
const SWEEP: Duration = Duration::from_secs(1);

/// A lock service in memory: [`Queue`] behind a mutex, one per partition.
///
/// For tests, for a single process, and beside a store whose fence protects it from other
/// processes. Its clock starts at the system's time and then only runs forward.
pub struct MemoryBackend {
    partitions: Vec<Mutex<State>>,
    sinks: Mutex<HashMap<ClientId, Sink>>,
    epoch_us: u64,
    started: Instant,
}

struct State {
    queue: Queue,
    swept: Instant,
}

impl MemoryBackend {
    /// A service with one partition, so that any set of keys is decided in one step.
    #[must_use]
    pub fn new() -> Self {
        Self::with_partitions(1)
    }

    /// A service with `partitions` partitions (at least one), as a cluster has.
    #[must_use]
    pub fn with_partitions(partitions: u16) -> Self {
        let started = Instant::now();
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let state = || Mutex::new(State { queue: Queue::default(), swept: started });
        Self {
            partitions: (0..partitions.max(1)).map(|_| state()).collect(),
            sinks: Mutex::new(HashMap::new()),
            epoch_us: u64::try_from(since.as_micros()).unwrap_or(u64::MAX),
            started,
        }
    }

    /// Forgets every lock, every waiter and the token counters, as a restart of a server without
    /// persistence does.
    pub fn forget(&self) {
        for partition in &self.partitions {
            lock(partition).queue = Queue::default();
        }
    }

    fn now_us(&self) -> u64 {
        let passed = self.started.elapsed().as_micros();
        self.epoch_us.saturating_add(u64::try_from(passed).unwrap_or(u64::MAX))
    }

    /// Takes one step in a partition, then pushes what it has to tell.
    fn step<T>(
        &self,
        partition: Partition,
        operation: &'static str,
        step: impl FnOnce(&mut Queue, u64) -> Result<T, Corrupt>,
    ) -> Result<T> {
        let state = self.partitions.get(usize::from(partition.0)).ok_or_else(|| {
            let detail = format!("there is no partition {partition}");
            Error::new(ErrorKind::InvalidInput, operation, detail)
        })?;
        let (answer, handed_over, followed) = {
            let mut state = lock(state);
            let now_us = self.now_us();
            if state.swept.elapsed() > SWEEP {
                state.swept = Instant::now();
                state.queue.sweep(now_us).map_err(|Corrupt| corrupt(operation))?;
            }
            let answer = step(&mut state.queue, now_us);
            (answer, state.queue.take_hand_overs(), state.queue.take_followed())
        };
        let handed_over = handed_over.into_iter().map(|over| (over.client, Push::HandOver(over)));
        let followed = followed.into_iter().map(|by| (by.client, Push::Followed(by)));
        for (client, push) in handed_over.chain(followed) {
            let sink = lock(&self.sinks).get(&client).cloned();
            if let Some(sink) = sink {
                sink(push);
            }
        }
        answer.map_err(|Corrupt| corrupt(operation))
    }
}

impl Default for MemoryBackend {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryBackend").field("partitions", &self.partitions.len()).finish()
    }
}

#[async_trait]
impl LockBackend for MemoryBackend {
    fn capabilities(&self) -> Capabilities {
        let partitions = u16::try_from(self.partitions.len()).unwrap_or(u16::MAX);
        Capabilities { partitions, pushes: true }
    }

    async fn subscribe(&self, client: ClientId, sink: Sink) -> Result<()> {
        lock(&self.sinks).insert(client, sink);
        Ok(())
    }

    fn unsubscribe(&self, client: ClientId) {
        lock(&self.sinks).remove(&client);
    }

    async fn acquire(&self, ask: &Acquire) -> Result<Acquired> {
        self.step(ask.part.partition, "acquire", |queue, now_us| queue.acquire(now_us, ask))
    }

    async fn renew(&self, partition: Partition, renewals: &[Renewal]) -> Result<Vec<Renewed>> {
        self.step(partition, "renew", |queue, now_us| queue.renew(now_us, renewals))
    }

    async fn release(&self, part: &Part) -> Result<Released> {
        self.step(part.partition, "release", |queue, now_us| queue.release(now_us, part))
    }

    async fn cancel(&self, part: &Part) -> Result<()> {
        self.step(part.partition, "cancel", |queue, now_us| queue.cancel(now_us, part))
    }

    async fn inspect(&self, partition: Partition, key: &ResourceKey) -> Result<Inspection> {
        self.step(partition, "inspect", |queue, now_us| Ok(queue.inspect(now_us, key)))
    }

    async fn ping(&self) -> Result<()> {
        Ok(())
    }
}

fn corrupt(operation: &'static str) -> Error {
    let detail = "the token counter or the floor is more than a day ahead of the clock; \
                  check the clocks, then raise or remove the counter by hand";
    Error::new(ErrorKind::Corrupt, operation, detail)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
