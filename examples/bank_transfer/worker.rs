//! A worker: runs its share of the transfers, several at a time, each exactly once.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use palisade::{Coordinator, Error, ErrorKind, Locks, Tx};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep};

use crate::Result;
use crate::bank::{Applied, Bank};
use crate::input::{Input, Transfer};
use crate::options::{Options, Without};
use crate::report::{Report, Timing};

const REPORT_EVERY: Duration = Duration::from_millis(100);
/// How long a single transfer, or the lock service at the start, may keep failing.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(50);

/// The whole life of a worker process: reports are lines of JSON on its output.
pub async fn child(options: &Options, number: u32) -> Result<()> {
    std::thread::spawn(|| {
        // The parent never writes. When this ends, the parent is gone, and nobody wants the work.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
    let input = Input::read(&options.file, options.limit)?;
    let print = |report| {
        let mut out = std::io::stdout().lock();
        serde_json::to_writer(&mut out, &report)?;
        out.write_all(b"\n")?;
        Ok(out.flush()?)
    };
    work(options, number, &input.transfers, print).await
}

/// Runs the share of worker `number`, and reports now and then and in the end.
pub async fn work(
    options: &Options,
    number: u32,
    transfers: &[Transfer],
    report: impl Fn(Report) -> Result<()>,
) -> Result<()> {
    let bank = Bank::open(&options.store, options.tasks).await?;
    let locks = connect(options).await?;
    // What a predecessor has finished is only skipped to save time. A commit of it that is still
    // under way is not seen here; the transaction itself asks again, under the locks.
    let applied = bank.applied().await?;
    let share = transfers.iter().skip(number as usize).step_by(options.processes as usize);
    let (done, todo): (Vec<_>, Vec<_>) = share.partition(|one| applied.contains(&one.id));
    let worker = Arc::new(Worker {
        coordinator: bank.coordinator(locks.clone(), options),
        bank,
        falls_back: options.fallback != Without::Fail,
        todo: Mutex::new(todo.into_iter().cloned().collect::<Vec<_>>().into_iter()),
        tally: Mutex::new(Report { done: done.len(), ..Report::default() }),
        lost_before: AtomicU64::new(0),
    });
    let mut tasks = JoinSet::new();
    for _ in 0..options.tasks {
        tasks.spawn(Arc::clone(&worker).run());
    }
    let mut tick = interval(REPORT_EVERY);
    loop {
        tokio::select! {
            joined = tasks.join_next() => match joined {
                Some(ended) => ended??,
                None => break,
            },
            _ = tick.tick() => report(worker.take_report())?,
        }
    }
    report(worker.take_report())
}

/// Connects, also to a server that is being restarted.
async fn connect(options: &Options) -> Result<Locks> {
    let started = Instant::now();
    loop {
        match palisade::connect_with(&options.locks, options.locking()).await {
            Err(error) if error.is_unavailable() && started.elapsed() < PATIENCE => {
                sleep(PAUSE).await;
            }
            answer => return Ok(answer?),
        }
    }
}

/// A transfer that is done.
struct Done {
    applied: Applied,
    waited: Duration,
    /// Without the lock service.
    degraded: bool,
}

struct Worker {
    bank: Bank,
    coordinator: Coordinator,
    falls_back: bool,
    todo: Mutex<std::vec::IntoIter<Transfer>>,
    tally: Mutex<Report>,
    lost_before: AtomicU64,
}

impl Worker {
    async fn run(self: Arc<Self>) -> Result<()> {
        while let Some(transfer) = self.next() {
            self.settle(&transfer).await?;
        }
        Ok(())
    }

    /// Tries until the transfer is known to be done.
    ///
    /// Every error but one means that nothing was done. `InDoubt` means that nobody knows; but the
    /// next attempt, which holds the same locks and comes after the same fence, finds the id of the
    /// transfer in the store or does not. So both are answered in the same way.
    async fn settle(&self, transfer: &Transfer) -> Result<()> {
        let asked = Instant::now();
        loop {
            let answer = self.attempt(transfer, asked).await;
            if self.note(transfer, asked, answer)? {
                return Ok(());
            }
            sleep(PAUSE).await;
        }
    }

    /// Counts an answer; whether it is the last one.
    fn note(
        &self,
        transfer: &Transfer,
        asked: Instant,
        answer: palisade::Result<Done>,
    ) -> palisade::Result<bool> {
        let mut tally = self.tally();
        match answer {
            Ok(Done { applied, waited, degraded }) => {
                tally.done += 1;
                tally.found += u64::from(applied == Applied::Before);
                tally.degraded += u64::from(degraded);
                let [wait_us, total_us] = [waited, asked.elapsed()].map(micros);
                tally.finished.push(Timing { id: transfer.id, wait_us, total_us });
                Ok(true)
            }
            Err(error) if may_pass(&error) && asked.elapsed() < PATIENCE => {
                tally.retries += 1;
                tally.in_doubt += u64::from(error.is_in_doubt());
                *tally.errors.entry(format!("{:?}", error.kind())).or_default() += 1;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// One call of `run`, which may be several attempts: how it went, and the wait for its locks.
    async fn attempt(&self, transfer: &Transfer, asked: Instant) -> palisade::Result<Done> {
        let attempts = AtomicU64::new(0);
        let work = async |tx: Tx| {
            let waited = asked.elapsed();
            if attempts.fetch_add(1, Ordering::Relaxed) > 0 {
                self.tally().retries += 1;
            }
            let applied = self.bank.apply(&tx, transfer).await;
            if matches!(&applied, Err(error) if error.kind() == ErrorKind::StaleToken) {
                self.tally().stale += 1;
            }
            Ok(Done { applied: applied?, waited, degraded: tx.is_degraded() })
        };
        let mut request = self.coordinator.transaction(transfer.keys());
        if self.falls_back {
            // Without the lock service, the store that is declared is where the locks are.
            request = self.bank.declare(request);
        }
        request.run(work).await
    }

    fn next(&self) -> Option<Transfer> {
        self.todo.lock().unwrap_or_else(PoisonError::into_inner).next()
    }

    fn tally(&self) -> MutexGuard<'_, Report> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_report(&self) -> Report {
        let lost = self.coordinator.statistics().lost;
        let mut tally = self.tally();
        tally.lost_leases = lost - self.lost_before.swap(lost, Ordering::Relaxed);
        let done = tally.done;
        std::mem::replace(&mut *tally, Report { done, ..Report::default() })
    }
}

/// Whether another attempt may meet another answer; the others are mistakes of the program or of
/// its configuration.
fn may_pass(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Unavailable
            | ErrorKind::TimedOut
            | ErrorKind::Busy
            | ErrorKind::LeaseLost
            | ErrorKind::StaleToken
            | ErrorKind::Conflict
            | ErrorKind::Aborted
            | ErrorKind::InDoubt
    )
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
