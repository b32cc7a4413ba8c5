//! W9: one owner enters its key up to four times, through two clients, and leaves in any order,
//! while replies are lost, releases arrive twice, and others release what is not theirs. Within a
//! stay the token is one and the same; and the service counts the entries exactly.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use palisade::backend::{LockBackend, MemoryBackend, RedisBackend, RedisOptions};
use palisade::protocol::{Holder, Part, Released};
use palisade::{ErrorKind, LockGuard, LockOptions, Locks, Mode, OwnerId, ResourceKey, Want};
use tokio::time::{Instant, sleep, timeout};

use crate::Result;
use crate::findings::Findings;
use crate::stage::Stage;
use crate::support::{Fault, Proxy, RedisServer};

const TASKS: usize = 4;
const DEPTH: usize = 4;
/// Long, so that no lease ends while a connection is replaced on a busy machine.
const LEASE: Duration = Duration::from_secs(10);
/// What a full run does; a shorter one, its share.
const FULL: (u64, u64) = (10_000, 60);

/// One owner's world.
struct Scene {
    backend: Arc<dyn LockBackend>,
    /// Made the owners; behind the proxy, where there is one.
    near: Locks,
    /// A client of another process, as far as the service can see.
    far: Locks,
    proxy: Option<Proxy>,
    key: ResourceKey,
    random: fastrand::Rng,
    counts: BTreeMap<&'static str, u64>,
}

/// One stay of an owner under its key.
struct Stay {
    owner: OwnerId,
    token: Option<u64>,
    /// Each with whether it was entered through the near client.
    guards: Vec<(LockGuard, bool)>,
}

pub async fn run(stage: &Stage) -> Result<Findings> {
    let memory = Arc::new(MemoryBackend::new());
    let mut scenes = Vec::new();
    for task in 0..TASKS {
        scenes.push(Scene::new(stage, &memory, task).await?);
    }
    let end = Instant::now() + stage.time;
    let ended = join_all(scenes.into_iter().map(|scene| tokio::spawn(scene.play(end)))).await;
    let mut findings = Findings::default();
    for scene in ended {
        let (counts, violation) = scene?;
        counts.into_iter().for_each(|(name, n)| *findings.figures.entry(name).or_default() += n);
        violation.into_iter().for_each(|what| findings.violation(what));
    }
    let figure = |name: &str| findings.figures.get(name).copied().unwrap_or(0);
    let wrong = figure("extra_releases") + figure("foreign_releases");
    let losses = figure("requests_lost") + figure("replies_lost");
    findings.ok =
        figure("entered") + figure("left") + wrong + figure("intruders") + figure("limited");
    findings.unknown = figure("unanswered");
    findings.bites = losses + figure("wrong_order") + wrong;
    let seconds = stage.time.as_secs();
    findings.need("operations", findings.ok, FULL.0 * seconds.min(FULL.1) / FULL.1);
    findings.need("bites", findings.bites, FULL.0 * seconds.min(FULL.1) / FULL.1 / 10);
    if stage.redis().is_some() {
        findings.need("messages lost", losses, seconds);
    }
    Ok(findings)
}

impl Stay {
    /// How many entries were made through one of the clients.
    fn entered(&self, near: bool) -> usize {
        self.guards.iter().filter(|(_, of)| *of == near).count()
    }
}

impl Scene {
    async fn new(stage: &Stage, memory: &Arc<MemoryBackend>, task: usize) -> Result<Self> {
        let (near, far, proxy): (Arc<dyn LockBackend>, Arc<dyn LockBackend>, _);
        (near, far, proxy) = match stage.redis() {
            Some(redis) => {
                let proxy = Proxy::start(redis.port()).await;
                let url = format!("redis://127.0.0.1:{}", proxy.port());
                (connect(&url).await?, connect(&RedisServer::url(redis)).await?, Some(proxy))
            }
            None => (Arc::clone(memory) as _, Arc::clone(memory) as _, None),
        };
        let options = LockOptions::default();
        Ok(Self {
            backend: Arc::clone(&far),
            near: Locks::with_options(near, options).await?,
            far: Locks::with_options(far, options).await?,
            proxy,
            key: ResourceKey::parse(format!("key-{task}"))?,
            random: stage.random(task as u64),
            counts: BTreeMap::new(),
        })
    }

    /// Stay after stay, until the time is over or something was wrong.
    async fn play(mut self, end: Instant) -> (BTreeMap<&'static str, u64>, Option<String>) {
        let mut highest = 0;
        while Instant::now() < end {
            let mut stay = Stay { owner: self.near.owner(), token: None, guards: Vec::new() };
            match self.stay(&mut stay, highest).await {
                Ok(()) => highest = stay.token.unwrap_or(highest),
                Err(what) => return (self.counts, Some(format!("{}: {what}", self.key))),
            }
        }
        (self.counts, None)
    }

    /// Enters, wanders, and leaves for good; `Err` says what was wrong.
    async fn stay(&mut self, stay: &mut Stay, highest: u64) -> Result<(), String> {
        self.enter(stay, true).await?;
        if stay.token <= Some(highest) {
            return Err(format!("token {:?} after {highest}", stay.token));
        }
        for _ in 0..self.random.usize(4..16) {
            if stay.guards.is_empty() {
                break;
            }
            match self.random.u8(..20) {
                0..8 if stay.guards.len() < DEPTH => {
                    let near = self.random.bool();
                    self.enter(stay, near).await?;
                }
                0..8 => self.enter_too_often(stay).await?,
                8..14 => self.leave(stay, false).await?,
                14..17 => self.release_as_another(stay).await?,
                17..19 => self.intrude(stay).await?,
                _ if self.proxy.is_some() => self.lose_a_message(stay).await?,
                _ => {}
            }
            self.check(stay).await?;
        }
        while !stay.guards.is_empty() {
            self.leave(stay, false).await?;
            self.check(stay).await?;
        }
        Ok(())
    }

    async fn enter(&mut self, stay: &mut Stay, near: bool) -> Result<(), String> {
        let locks = if near { &self.near } else { &self.far };
        let request = locks.lock(&self.key).owner(stay.owner).ttl(LEASE).max_entries(DEPTH as u32);
        let guard = match request.acquire().await {
            Ok(guard) => guard,
            Err(error) if error.is_unavailable() => {
                self.count("unanswered");
                return self.settle(stay).await;
            }
            Err(error) => return Err(format!("enter: {error:?}")),
        };
        let token = guard.token().get();
        if *stay.token.get_or_insert(token) != token {
            return Err(format!("token {token} within a stay under {:?}", stay.token));
        }
        stay.guards.push((guard, near));
        self.count("entered");
        Ok(())
    }

    async fn enter_too_often(&mut self, stay: &Stay) -> Result<(), String> {
        let request = self.near.lock(&self.key).owner(stay.owner).max_entries(DEPTH as u32);
        match request.acquire().await {
            Err(error) if error.kind() == ErrorKind::LimitReached => {
                self.count("limited");
                Ok(())
            }
            other => Err(format!("entered beyond the limit: {other:?}")),
        }
    }

    /// Releases any entry, not only the latest; then the same release arrives once more.
    ///
    /// Where the reply was `lossy` and got lost, the copy that was sent for it finds nothing to
    /// release; then the guard does not know, and the watchdog settles it.
    async fn leave(&mut self, stay: &mut Stay, lossy: bool) -> Result<(), String> {
        let before = self.entries().await?;
        let at = loop {
            let at = self.random.usize(..stay.guards.len());
            if !lossy || stay.guards[at].1 {
                break at;
            }
        };
        if at + 1 < stay.guards.len() {
            self.count("wrong_order");
        }
        match stay.guards.swap_remove(at).0.release().await {
            Ok(()) => self.count("left"),
            Err(error) if error.is_unavailable() => {
                self.count("unanswered");
                self.settle(stay).await?;
            }
            Err(error) => return Err(format!("leave: {error:?}")),
        }
        let after = self.entries().await?;
        let is_gone = |entry: &&Holder| !after.iter().any(|left| left.request == entry.request);
        let gone: Vec<&Holder> = before.iter().filter(is_gone).collect();
        let [gone] = gone[..] else {
            return Err(format!("one release took {gone:?} of {before:?}"));
        };
        self.count("extra_releases");
        self.release_in_vain(gone.owner, gone).await
    }

    async fn release_as_another(&mut self, stay: &Stay) -> Result<(), String> {
        let entries = self.entries().await?;
        let entry = &entries[self.random.usize(..entries.len())];
        let stranger = if self.random.bool() { self.far.owner() } else { self.near.owner() };
        debug_assert_ne!(stranger, stay.owner);
        self.count("foreign_releases");
        self.release_in_vain(stranger, entry).await
    }

    /// A release below the guards, which must find nothing to release.
    async fn release_in_vain(&self, owner: OwnerId, entry: &Holder) -> Result<(), String> {
        let partition = self.key.partition(self.backend.capabilities().partitions);
        let wants = vec![Want::new(self.key.clone(), Mode::Exclusive)];
        let part = Part { partition, owner, request: entry.request, wants: wants.into() };
        match self.backend.release(&part).await {
            Ok(Released::Gone) => Ok(()),
            other => Err(format!("a release by {owner} of {entry:?}: {other:?}")),
        }
    }

    /// Another owner tries the key.
    async fn intrude(&mut self, stay: &Stay) -> Result<(), String> {
        self.count("intruders");
        match self.far.lock(&self.key).try_acquire().await {
            Ok(None) => Ok(()),
            other => Err(format!("beside {}: {other:?}", stay.owner)),
        }
    }

    /// Enters or leaves while the next message on the way is lost.
    async fn lose_a_message(&mut self, stay: &mut Stay) -> Result<(), String> {
        let has_near = stay.entered(true) > 0;
        if stay.guards.len() == DEPTH && !has_near {
            return Ok(());
        }
        let reply = self.random.bool();
        if let Some(proxy) = &self.proxy {
            let fault = if reply { Fault::LoseReply } else { Fault::LoseRequest };
            // Every request begins so.
            proxy.plan("*", fault);
        }
        if stay.guards.len() == DEPTH || has_near && self.random.bool() {
            self.leave(stay, true).await?;
        } else {
            self.enter(stay, true).await?;
        }
        if let Some(proxy) = &self.proxy {
            let happened = timeout(Duration::ZERO, proxy.happened()).await.is_ok();
            if happened {
                self.count(if reply { "replies_lost" } else { "requests_lost" });
            }
        }
        Ok(())
    }

    /// The service has exactly the entries that the guards stand for, all of one owner and token.
    async fn check(&self, stay: &Stay) -> Result<(), String> {
        let entries = self.entries().await?;
        let same =
            |entry: &Holder| entry.owner == stay.owner && Some(entry.token.get()) == stay.token;
        if entries.len() != stay.guards.len() || !entries.iter().all(same) {
            let guards = stay.guards.len();
            return Err(format!("{guards} guards of {}, but {entries:?}", stay.owner));
        }
        for (guard, near) in &stay.guards {
            // Each client counts what was entered through it.
            let (count, entered) = (guard.info().hold_count, stay.entered(*near));
            if count != entered {
                return Err(format!("a hold count of {count}, but {entered} guards"));
            }
        }
        Ok(())
    }

    /// After an answer that never came: what is left is settled in the background.
    async fn settle(&self, stay: &Stay) -> Result<(), String> {
        let deadline = Instant::now() + LEASE;
        while self.entries().await?.len() != stay.guards.len() {
            if Instant::now() > deadline {
                return Err("nobody settled what was not answered".to_owned());
            }
            sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    async fn entries(&self) -> Result<Vec<Holder>, String> {
        let shown = self.far.inspect(&self.key).await;
        shown.map(|shown| shown.holders).map_err(|error| format!("inspect: {error:?}"))
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }
}

async fn connect(url: &str) -> Result<Arc<dyn LockBackend>> {
    Ok(Arc::new(RedisBackend::connect(url, RedisOptions::default()).await?))
}
