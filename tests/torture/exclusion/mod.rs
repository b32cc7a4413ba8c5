//! W2: who holds a lock holds it alone. Without faults, no two holds overlap. When holders are
//! stopped, cut off, or forgotten by the service, the loser's next call fails; and one that runs is
//! told before anybody else is granted.
//!
//! The control is in the same history: a holder that was overtaken before its next call, and had
//! trusted in its grant, would have been one of two. A run without enough of them is void.
//!
//! Locks in memory are those of one process, so there the workers are the tasks of one.

mod holder;
mod oracle;

use std::time::Duration;

use futures_util::future::join_all;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, sleep_until};

use crate::crew::{Member, Pool};
use crate::findings::Findings;
use crate::history::{self, History, Outcome};
use crate::stage::Stage;
use crate::support::{Fault as Loss, Proxy};
use crate::worker::{Order, Settings, Word, Work};
use crate::{Result, clock};

pub use holder::worker;

const KEYS: usize = 8;
const WORKERS: usize = 16;
const PROCESSES: usize = 4;
const LEASE: Duration = Duration::from_secs(1);
/// How long a worker may take to come by a seam.
const SEAM: Duration = Duration::from_secs(3);

/// One time that a key was held, from the grant to the first call after it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hold {
    pub id: String,
    pub key: String,
    pub shared: bool,
    pub token: u64,
    pub asked: u64,
    pub granted: u64,
    /// Whether the holder waited to be told of a loss, or asked again and again.
    pub listens: bool,
    /// The last time that it asked and was told that it still holds the key; 0 if it never was.
    pub believed: u64,
    /// When it was told that the lease is lost.
    pub told: Option<u64>,
    /// How late a plain timer was beside it, at worst.
    pub late: u64,
    /// For how long the process was stopped at the seam.
    pub stopped: u64,
    /// When the first call was made, and what it answered.
    pub called: u64,
    pub answer: Outcome,
    pub last: bool,
}

/// Something that was done to a worker, or to all of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Fault {
    kind: Kind,
    worker: String,
    from: u64,
    to: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    /// The process did not run.
    Stop,
    /// It could not reach the lock service.
    Cut,
    /// The service lost its memory.
    Flush,
}

pub async fn run(stage: &Stage) -> Result<Findings> {
    let mut proxies = Vec::new();
    if let Some(redis) = stage.redis() {
        for _ in 0..PROCESSES {
            proxies.push(Proxy::start(redis.port()).await);
        }
    }
    let processes = proxies.len().max(1);
    let mut members = Vec::new();
    for n in 0..processes {
        let proxied = proxies.get(n).map(|proxy| format!("redis://127.0.0.1:{}", proxy.port()));
        let settings = Settings {
            work: Work::Exclusion,
            name: format!("w{n}"),
            directory: stage.directory().to_owned(),
            locks: proxied.unwrap_or_else(|| stage.locks()),
            store: String::new(),
            lease: LEASE,
            tasks: WORKERS / processes,
            seed: stage.random(n as u64).u64(..),
        };
        members.push(Member::start(settings).await?);
    }
    let pool = Pool::new(members);
    let faults = History::open(stage.directory(), "faults")?;
    sleep(stage.time / 3).await;
    let peace = clock::now();
    let until = Instant::now() + stage.time - stage.time / 3;
    let nemesis = Nemesis {
        stage,
        pool: &pool,
        proxies: &proxies,
        faults: &faults,
        remembers: Mutex::default(),
        until,
    };
    tokio::join!(nemesis.stops(), nemesis.stops_anywhere(), nemesis.cuts(), nemesis.flushes());
    sleep(LEASE * 2).await;
    let mut failed = Vec::new();
    for ended in join_all(pool.dissolve().into_iter().map(Member::end)).await {
        match ended {
            Ok(status) if status.success() => {}
            Ok(status) => failed.push(format!("a worker failed: {status}; see its log")),
            Err(error) => failed.push(error.to_string()),
        }
    }
    let holds: Vec<Hold> = history::read(stage.directory(), "w")?;
    let faults: Vec<Fault> = history::read(stage.directory(), "faults")?;
    let seen = oracle::judge(&holds, &faults, peace, LEASE);
    let mut findings = seen.findings;
    findings.ok = seen.ok;
    findings.bites = seen.overtaken + seen.told;
    let last = holds.iter().filter(|hold| hold.last && hold.answer == Outcome::Ok).count();
    if failed.is_empty() && last < WORKERS {
        failed.push(format!("healed, only {last} of {WORKERS} last holds succeeded"));
    }
    findings.violations.extend(failed);
    let seconds = stage.time.as_secs();
    findings.figures.insert("peaceful", seen.peaceful);
    findings.figures.insert("overtaken", seen.overtaken);
    findings.figures.insert("told", seen.told);
    findings.figures.insert("told_first", seen.told_first);
    findings.need("peaceful", seen.peaceful, seconds);
    findings.need("overtaken", seen.overtaken, seconds.div_ceil(10));
    if stage.redis().is_some() {
        findings.need("told", seen.told, seconds.div_ceil(20));
    }
    Ok(findings)
}

/// What goes wrong on purpose, each kind at its own times.
struct Nemesis<'r> {
    stage: &'r Stage,
    pool: &'r Pool,
    proxies: &'r [Proxy],
    faults: &'r History,
    /// Held while a worker that is cut off must lose its lease by time alone.
    remembers: Mutex<()>,
    until: Instant,
}

impl Nemesis<'_> {
    /// A holder stops right after its grant, for longer than its lease.
    async fn stops(&self) {
        let mut random = self.stage.random(101);
        let mut next = Instant::now() + Duration::from_millis(300);
        while self.wait(&mut next, Duration::from_secs(2)).await {
            let mut victim = self.pool.take(&mut random).await;
            let from = clock::now();
            if victim.stopped_at_seam(SEAM).await.is_some() {
                sleep(LEASE.mul_f64(1.5 + 1.5 * random.f64())).await;
                victim.signal(Signal::CONT);
                self.note(Kind::Stop, &victim, from);
            }
            self.pool.give_back(victim);
        }
    }

    async fn stops_anywhere(&self) {
        let mut random = self.stage.random(102);
        let mut next = Instant::now() + Duration::from_millis(1_700);
        while self.wait(&mut next, Duration::from_secs(4)).await {
            let victim = self.pool.take(&mut random).await;
            let from = clock::now();
            victim.signal(Signal::STOP);
            sleep(LEASE.mul_f64(1.5 + 1.5 * random.f64())).await;
            victim.signal(Signal::CONT);
            self.note(Kind::Stop, &victim, from);
            self.pool.give_back(victim);
        }
    }

    /// A worker that runs cannot reach Redis while it holds a key that it will not give up.
    async fn cuts(&self) {
        if self.proxies.is_empty() {
            return;
        }
        let mut random = self.stage.random(103);
        let mut next = Instant::now() + Duration::from_millis(1_000);
        while self.wait(&mut next, Duration::from_secs(3)).await {
            let mut victim = self.pool.take(&mut random).await;
            let _remembers = self.remembers.lock().await;
            victim.tell(Order::Hold).await;
            if let Some(Word::Holding) = victim.word(SEAM).await {
                let from = clock::now();
                let number: usize = victim.settings.name[1..].parse().unwrap();
                let proxy = &self.proxies[number];
                proxy.refuse(true);
                // Every request begins so.
                proxy.plan("*", Loss::LoseRequest);
                sleep(LEASE * 3 / 2).await;
                proxy.refuse(false);
                self.note(Kind::Cut, &victim, from);
            }
            self.pool.give_back(victim);
        }
    }

    /// The service loses its memory.
    async fn flushes(&self) {
        let mut random = self.stage.random(104);
        let mut next = Instant::now() + Duration::from_millis(2_500);
        while self.wait(&mut next, Duration::from_secs(3)).await {
            let _forgets = self.remembers.lock().await;
            let from = clock::now();
            if let Some(redis) = self.stage.redis() {
                redis.command(&["FLUSHALL"]);
                self.faults.note(&Fault {
                    kind: Kind::Flush,
                    worker: String::new(),
                    from,
                    to: clock::now(),
                });
            } else {
                let mut member = self.pool.take(&mut random).await;
                member.tell(Order::Forget).await;
                while !matches!(member.word(SEAM).await, Some(Word::Forgot) | None) {}
                self.note(Kind::Flush, &member, from);
                self.pool.give_back(member);
            }
        }
    }

    fn note(&self, kind: Kind, member: &Member, from: u64) {
        let worker = member.settings.name.clone();
        self.faults.note(&Fault { kind, worker, from, to: clock::now() });
    }

    async fn wait(&self, next: &mut Instant, period: Duration) -> bool {
        if (*next).max(Instant::now()) >= self.until {
            return false;
        }
        sleep_until(*next).await;
        *next += period;
        true
    }
}
