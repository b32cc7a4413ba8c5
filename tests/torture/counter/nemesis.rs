//! What goes wrong on purpose in W1, and when.
//!
//! Every worker is stopped at the seam, at random, or killed, several of them at once, while Redis
//! loses its memory. Each kind of fault keeps its own time.

use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::client::Client;
use super::{LEASE, blocks};
use crate::Result;
use crate::crew::Pool;
use crate::stage::Stage;

/// How long a worker may take to come by the seam.
const SEAM: Duration = Duration::from_secs(3);

pub struct Nemesis<'r> {
    pub stage: &'r Stage,
    pub pool: &'r Pool,
    pub rival: &'r Client,
    pub until: Duration,
}

impl Nemesis<'_> {
    /// Goes on until the time is over; then all workers run, and so does Redis.
    pub async fn rage(&self) -> Result<()> {
        let end = Instant::now() + self.until;
        let faults = tokio::join!(
            self.stops_between_grant_and_fence(end),
            self.stops_anywhere(end),
            self.overtakes(end),
            self.kills(end),
            self.empty_restarts(end),
        );
        faults.3
    }

    /// Every 4 s: a holder stops before its fence, for longer than its lease; somebody else takes
    /// the key meanwhile.
    async fn stops_between_grant_and_fence(&self, end: Instant) {
        let mut times = Times::new(self.stage, 1, end, Duration::from_millis(500));
        while times.next(Duration::from_secs(4)).await {
            self.long_stop(&mut times).await;
        }
    }

    async fn long_stop(&self, times: &mut Times) {
        let mut victim = self.pool.take(&mut times.random).await;
        if let Some(key) = victim.stopped_at_seam(SEAM).await {
            let woken = Instant::now() + times.long();
            let _ = timeout(times.long(), self.rival.take(&key)).await;
            sleep_until(woken).await;
            victim.signal(Signal::CONT);
        }
        self.pool.give_back(victim);
    }

    /// Every 4 s, in between: a worker is stopped wherever it is. Where that could be in a branch
    /// that keeps all others out, it is stopped at the seam instead.
    async fn stops_anywhere(&self, end: Instant) {
        let mut times = Times::new(self.stage, 2, end, Duration::from_millis(2_500));
        while times.next(Duration::from_secs(4)).await {
            if blocks(self.stage.backend) {
                self.long_stop(&mut times).await;
                continue;
            }
            let victim = self.pool.take(&mut times.random).await;
            victim.signal(Signal::STOP);
            sleep(times.long()).await;
            victim.signal(Signal::CONT);
            self.pool.give_back(victim);
        }
    }

    /// Every 1.5 s: a holder stops before its fence, for a moment in which the lock service loses
    /// its memory and somebody else takes the key and commits. The holder has every reason to
    /// believe in its lease; only the store knows better.
    async fn overtakes(&self, end: Instant) {
        let mut times = Times::new(self.stage, 3, end, Duration::from_millis(700));
        while times.next(Duration::from_millis(1_500)).await {
            let mut victim = self.pool.take(&mut times.random).await;
            if let Some(key) = victim.stopped_at_seam(SEAM).await {
                if let Some(redis) = self.stage.redis() {
                    // It fails while the server is being restarted, which does the same.
                    let _ = redis.try_command(&["FLUSHALL"]);
                }
                let _ = timeout(LEASE / 2, self.rival.take(&key)).await;
                victim.signal(Signal::CONT);
            }
            self.pool.give_back(victim);
        }
    }

    /// Every 5 s: a worker is killed (SIGKILL), and another one takes its place.
    async fn kills(&self, end: Instant) -> Result<()> {
        let mut times = Times::new(self.stage, 4, end, Duration::from_millis(3_700));
        while times.next(Duration::from_secs(5)).await {
            let victim = self.pool.take(&mut times.random).await;
            self.pool.give_back(victim.replace().await?);
        }
        Ok(())
    }

    /// Every 10 s: Redis is killed and comes back empty.
    async fn empty_restarts(&self, end: Instant) {
        let Some(redis) = self.stage.redis() else { return };
        let mut times = Times::new(self.stage, 5, end, Duration::from_millis(5_300));
        while times.next(Duration::from_secs(10)).await {
            tokio::task::block_in_place(|| redis.restart_empty());
        }
    }
}

/// When a kind of fault strikes next, and its own chance.
struct Times {
    random: fastrand::Rng,
    next: Instant,
    end: Instant,
}

impl Times {
    fn new(stage: &Stage, kind: u64, end: Instant, first: Duration) -> Self {
        let random = stage.random(100 + kind);
        Self { random, next: Instant::now() + first, end }
    }

    /// Waits for its time; `false` when there is none left.
    async fn next(&mut self, period: Duration) -> bool {
        if self.next.max(Instant::now()) >= self.end {
            return false;
        }
        sleep_until(self.next).await;
        self.next += period;
        true
    }

    /// One and a half to three leases.
    fn long(&mut self) -> Duration {
        LEASE.mul_f64(1.5 + 1.5 * self.random.f64())
    }
}
