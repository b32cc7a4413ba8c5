//! W10: thousands of leases are renewed side by side, and none is lost, while another server that
//! the same process has leases at answers nothing. Those who hold leases there are told by the time
//! their leases end, so before anybody else could be granted them.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::{self, StreamExt};
use palisade::backend::{
    Capabilities, LockBackend, MemoryBackend, Probe, RedisBackend, RedisOptions, Sink,
};
use palisade::protocol::{Acquire, Acquired, Inspection, Part, Released, Renewal, Renewed};
use palisade::{ClientId, LockGuard, LockOptions, Locks, Partition, ResourceKey};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use crate::findings::Findings;
use crate::stage::Stage;
use crate::support::RedisServer;
use crate::{Result, clock};

const LEASE: Duration = Duration::from_secs(3);
/// What a full run holds; a shorter one, its share. The other server has a tenth of it.
const FULL: (u64, u64) = (10_000, 60);
/// How many are acquired at once.
const SIDE_BY_SIDE: usize = 64;

pub async fn run(stage: &Stage) -> Result<Findings> {
    let seconds = stage.time.as_secs();
    let leases = (FULL.0 * seconds.min(FULL.1) / FULL.1) as usize;
    let healthy = match stage.redis() {
        Some(redis) => connect(redis).await?,
        None => Arc::new(MemoryBackend::new()),
    };
    let healthy = Locks::with_options(healthy, LockOptions::default()).await?;
    let hole = Hole::new(stage).await?;
    let end = Instant::now() + stage.time;
    let held = take(&healthy, leases).await?;
    let mut findings = Findings::default();
    let mut told = 0;
    let mut late = 0;
    loop {
        let round = blackout(&hole, leases / 10).await?;
        told += round.told;
        late = late.max(round.late);
        round.violations.into_iter().for_each(|what| findings.violation(what));
        if Instant::now() + LEASE * 3 > end {
            break;
        }
    }
    sleep_until(end).await;
    let renewed = healthy.statistics().renewed;
    let lost = held.iter().filter(|guard| !guard.is_held()).count() as u64;
    let noticed = healthy.statistics().lost;
    let released = stream::iter(held).map(LockGuard::release).buffer_unordered(SIDE_BY_SIDE);
    let released = released.filter(|answer| std::future::ready(answer.is_ok())).count().await;
    if lost + noticed > 0 || released < leases {
        let what = format!("{lost} or {noticed} healthy leases lost; {released} could be released");
        findings.violation(what);
    }
    findings.ok = released as u64;
    findings.bites = told;
    findings.figures.insert("leases", leases as u64);
    findings.figures.insert("renewed", renewed);
    findings.figures.insert("latest_told_us", late / 1_000);
    findings.need("holders told", told, (leases / 10) as u64);
    // Three times a lease, less what the first interval and the end cut off.
    findings.need("renewals", renewed, leases as u64 * seconds / 2);
    Ok(findings)
}

/// Takes so many keys, one lease each.
async fn take(locks: &Locks, leases: usize) -> Result<Vec<LockGuard>> {
    let requests = (0..leases).map(|n| locks.lock(format!("key-{n}")).ttl(LEASE).acquire());
    let guards = stream::iter(requests).buffer_unordered(SIDE_BY_SIDE);
    let guards: Vec<palisade::Result<LockGuard>> = guards.collect().await;
    Ok(guards.into_iter().collect::<palisade::Result<_>>()?)
}

/// What came of one time that the other server answered nothing.
#[derive(Default)]
struct Round {
    told: u64,
    /// How long after the end of its lease the last one was told, in nanoseconds.
    late: u64,
    violations: Vec<String>,
}

/// Takes leases at the other server, stops it, and looks when their holders are told.
async fn blackout(hole: &Hole, leases: usize) -> Result<Round> {
    let locks = hole.client().await?;
    let guards = take(&locks, leases).await?;
    hole.stop();
    // What the server had answered before has arrived by now.
    sleep(LEASE / 30).await;
    let timer = tokio::spawn(lateness(LEASE * 2));
    let mut holders = JoinSet::new();
    for guard in guards {
        let ends = clock::now() + clock::nanos(guard.info().expires_in);
        holders.spawn(async move {
            guard.lost().await;
            (clock::now(), ends, guard)
        });
    }
    let mut round = Round::default();
    let mut lost = Vec::new();
    let patience = Instant::now() + LEASE * 4;
    while !holders.is_empty() {
        let Ok(Some(holder)) = timeout_at(patience, holders.join_next()).await else {
            let count = holders.len();
            round.violations.push(format!("{count} holders were never told"));
            break;
        };
        let (told, ends, guard) = holder?;
        round.told += 1;
        round.late = round.late.max(told.saturating_sub(ends));
        lost.push(guard);
    }
    // The client counts less than the service, by the drift. Two tasks must wake up in that time,
    // the watchdog and the holder, each as late as any timer is here.
    let drift = palisade::Lease::new(LEASE)?.drift();
    let allowed = clock::nanos(drift) + 2 * timer.await?;
    if round.late > allowed {
        let (late, allowed) = (round.late, allowed);
        round.violations.push(format!("told {late} ns after the lease, {allowed} ns are allowed"));
    }
    hole.go_on();
    // Now the service gives them to others; and the losers can do nothing about it.
    let others = hole.client().await?;
    let taken = take(&others, leases).await?;
    for guard in lost {
        if guard.renew().await.is_ok() {
            round.violations.push(format!("renewed after it was lost: {guard:?}"));
        }
    }
    if let Some(guard) = taken.iter().find(|guard| !guard.is_held()) {
        round.violations.push(format!("lost on a server that answers again: {guard:?}"));
    }
    for guard in taken {
        guard.release().await?;
    }
    Ok(round)
}

/// How late plain timers are on this machine, at worst, in nanoseconds.
async fn lateness(time: Duration) -> u64 {
    const TICK: Duration = Duration::from_millis(2);
    let end = clock::now() + clock::nanos(time);
    let mut worst = 0;
    while clock::now() < end {
        let due = clock::now() + clock::nanos(TICK);
        sleep(TICK).await;
        worst = worst.max(clock::now().saturating_sub(due));
    }
    worst
}

async fn connect(redis: &RedisServer) -> Result<Arc<dyn LockBackend>> {
    Ok(Arc::new(RedisBackend::connect(&redis.url(), RedisOptions::default()).await?))
}

/// A lock service that can be made to answer nothing.
enum Hole {
    /// A server of its own, which is stopped (SIGSTOP).
    Redis(Box<RedisServer>),
    Memory(Arc<Silent>),
}

impl Hole {
    async fn new(stage: &Stage) -> Result<Self> {
        Ok(match stage.redis() {
            Some(_) => Self::Redis(Box::new(RedisServer::start())),
            None => Self::Memory(Arc::new(Silent::new())),
        })
    }

    async fn client(&self) -> Result<Locks> {
        let backend: Arc<dyn LockBackend> = match self {
            Self::Redis(redis) => connect(redis).await?,
            Self::Memory(silent) => Arc::clone(silent) as _,
        };
        Ok(Locks::with_options(backend, LockOptions::default()).await?)
    }

    fn stop(&self) {
        match self {
            Self::Redis(redis) => tokio::task::block_in_place(|| redis.stop()),
            Self::Memory(silent) => drop(silent.0.send_replace(true)),
        }
    }

    fn go_on(&self) {
        match self {
            Self::Redis(redis) => redis.cont(),
            Self::Memory(silent) => drop(silent.0.send_replace(false)),
        }
    }
}

/// Locks in memory behind a wall: while it is up, no call comes through, and none is answered.
#[derive(Debug)]
struct Silent(watch::Sender<bool>, MemoryBackend);

impl Silent {
    fn new() -> Self {
        Self(watch::Sender::new(false), MemoryBackend::new())
    }

    async fn through(&self) -> &MemoryBackend {
        let mut wall = self.0.subscribe();
        // It fails only when the sender is gone, which is in `self`.
        let _ = wall.wait_for(|up| !*up).await;
        &self.1
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl LockBackend for Silent {
    fn capabilities(&self) -> Capabilities {
        self.1.capabilities()
    }

    async fn subscribe(&self, client: ClientId, sink: Sink) -> palisade::Result<()> {
        self.through().await.subscribe(client, sink).await
    }

    fn unsubscribe(&self, client: ClientId) {
        self.1.unsubscribe(client);
    }

    async fn acquire(&self, ask: &Acquire) -> palisade::Result<Acquired> {
        self.through().await.acquire(ask).await
    }

    async fn renew(
        &self,
        partition: Partition,
        renewals: &[Renewal],
    ) -> palisade::Result<Vec<Renewed>> {
        self.through().await.renew(partition, renewals).await
    }

    async fn release(&self, part: &Part) -> palisade::Result<Released> {
        self.through().await.release(part).await
    }

    async fn cancel(&self, part: &Part) -> palisade::Result<()> {
        self.through().await.cancel(part).await
    }

    async fn inspect(
        &self,
        partition: Partition,
        key: &ResourceKey,
    ) -> palisade::Result<Inspection> {
        self.through().await.inspect(partition, key).await
    }

    async fn ping(&self) -> palisade::Result<()> {
        self.through().await.ping().await
    }

    async fn probe(&self) -> palisade::Result<Probe> {
        self.through().await.probe().await
    }
}
