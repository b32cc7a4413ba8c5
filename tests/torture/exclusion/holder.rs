//! A worker of W2: takes keys, looks whether it still holds them, and writes down what it saw.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use palisade::backend::MemoryBackend;
use palisade::{LockGuard, LockOptions, Locks};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::{Hold, KEYS};
use crate::history::{History, Outcome};
use crate::worker::{Order, Seam, Settings, Word, say};
use crate::{Result, clock};

const WAIT: Duration = Duration::from_secs(5);
/// How long the last hold of a task is waited for: it must succeed on a busy machine too.
const LAST_WAIT: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(20);
/// How often a holder looks.
const TICK: Duration = Duration::from_millis(5);

struct Worker {
    settings: Settings,
    locks: Locks,
    history: History,
    /// Where a holder stops its process.
    seam: Seam,
    /// Where a holder keeps its key until it loses it.
    hold: Seam,
    count: AtomicU64,
    ending: AtomicBool,
}

/// The whole life of a worker process of W2.
pub async fn worker(settings: Settings, mut orders: UnboundedReceiver<Order>) -> Result<()> {
    let memory = (settings.locks == "memory:").then(|| Arc::new(MemoryBackend::new()));
    let locks = match &memory {
        Some(memory) => {
            let memory = Arc::clone(memory);
            Locks::with_options(memory, LockOptions::default()).await?
        }
        None => settings.connect().await?,
    };
    let worker = Arc::new(Worker {
        locks,
        history: settings.history()?,
        settings,
        seam: Seam::default(),
        hold: Seam::default(),
        count: AtomicU64::new(0),
        ending: AtomicBool::new(false),
    });
    let mut tasks = JoinSet::new();
    for task in 0..worker.settings.tasks {
        let random = fastrand::Rng::with_seed(worker.settings.seed ^ task as u64);
        tasks.spawn(Arc::clone(&worker).work(random));
    }
    say(&Word::Ready);
    while let Some(order) = orders.recv().await {
        match order {
            Order::Stop => worker.seam.arm(true),
            Order::Hold => worker.hold.arm(true),
            Order::Forget => {
                if let Some(memory) = &memory {
                    memory.forget();
                }
                say(&Word::Forgot);
            }
            Order::Cut | Order::Heal => {}
            Order::Last => break,
        }
    }
    worker.seam.arm(false);
    worker.hold.arm(false);
    worker.ending.store(true, Ordering::SeqCst);
    tasks.join_all().await;
    Ok(())
}

impl Worker {
    async fn work(self: Arc<Self>, mut random: fastrand::Rng) {
        while !self.ending.load(Ordering::SeqCst) {
            let answer = self.hold_once(&mut random, false).await;
            if answer != Some(Outcome::Ok) {
                sleep(PAUSE).await;
            }
        }
        self.hold_once(&mut random, true).await;
    }

    /// Takes a key, holds it for a while, and notes what it saw; `None` without a grant.
    async fn hold_once(&self, random: &mut fastrand::Rng, last: bool) -> Option<Outcome> {
        let key = format!("key-{}", random.usize(..KEYS));
        let shared = random.u8(..4) == 0;
        let request = if shared {
            self.locks.lock_all::<&str>([]).shared([&key])
        } else {
            self.locks.lock(&key)
        };
        let asked = clock::now();
        let wait = if last { LAST_WAIT } else { WAIT };
        let request = request.ttl(self.settings.lease).wait(wait);
        let guard = loop {
            match request.clone().acquire().await {
                Ok(guard) => break guard,
                // Right after an outage the client may refuse by itself.
                Err(error) if last && error.retry_after().is_some() => sleep(PAUSE).await,
                Err(_) => return None,
            }
        };
        let granted = clock::now();
        let number = self.count.fetch_add(1, Ordering::SeqCst);
        let mut hold = Hold {
            id: format!("{}-{number}", self.settings.name),
            key,
            shared,
            token: guard.token().get(),
            asked,
            granted,
            listens: random.bool(),
            believed: 0,
            told: None,
            late: 0,
            stopped: 0,
            called: 0,
            answer: Outcome::Unknown,
            last,
        };
        let lease = self.settings.lease;
        let mut time = Duration::ZERO;
        if last {
        } else if self.seam.is_due() {
            hold.stopped = self.seam.stop(&hold.key);
        } else if self.hold.is_due() {
            say(&Word::Holding);
            hold.listens = true;
            time = lease * 5;
        } else {
            // Every eighth is renewed on the way.
            let longest = if random.u8(..8) == 0 { lease * 3 / 2 } else { lease * 3 / 5 };
            time = longest.mul_f64(random.f64());
        }
        watch(&guard, &mut hold, time).await;
        if hold.stopped > 0 {
            // Time for somebody else to be granted the key before this one's first call.
            sleep(lease / 5).await;
        }
        hold.called = clock::now();
        hold.answer = match guard.renew().await {
            Ok(()) => Outcome::Ok,
            Err(error) if error.is_fenced_out() => Outcome::No,
            Err(_) => Outcome::Unknown,
        };
        self.history.note(&hold);
        let _ = guard.release().await;
        Some(hold.answer)
    }
}

/// Waits until the time is over or the lease is lost, whichever is first.
async fn watch(guard: &LockGuard, hold: &mut Hold, time: Duration) {
    let until = clock::now() + clock::nanos(time);
    loop {
        let now = clock::now();
        if !hold.listens {
            // To ask is to make it known, so one that listens must not ask.
            if !guard.is_held() {
                return;
            }
            hold.believed = now;
        }
        if now >= until {
            return;
        }
        tokio::select! {
            biased;
            () = guard.lost() => {
                hold.told = Some(clock::now());
                return;
            }
            () = sleep(TICK) => {}
        }
        let late = (clock::now() - now).saturating_sub(clock::nanos(TICK));
        hold.late = hold.late.max(late);
    }
}
