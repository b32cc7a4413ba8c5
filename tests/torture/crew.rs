//! The worker processes, seen from the conductor.

use std::fs;
use std::process::{ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::Result;
use crate::worker::{Order, Settings, Word};

/// How long a worker may take to start, or to end, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a worker that is to end is continued, in case it stops itself late.
const NUDGE: Duration = Duration::from_millis(200);

/// One worker process.
#[derive(Debug)]
pub struct Member {
    pub settings: Settings,
    /// How many processes this member has been.
    life: usize,
    child: Child,
    input: ChildStdin,
    words: UnboundedReceiver<Word>,
    id: Pid,
}

impl Member {
    /// Starts a worker and waits until it is ready.
    pub async fn start(settings: Settings) -> Result<Self> {
        Self::start_as(settings, 0).await
    }

    async fn start_as(settings: Settings, life: usize) -> Result<Self> {
        let mut own = settings.clone();
        own.name = format!("{}.{life}", settings.name);
        own.seed ^= (life as u64) << 48;
        let log = fs::File::create(own.directory.join(format!("{}.log", own.name)))?;
        let mut child = Command::new(std::env::current_exe()?)
            .args(["worker", "--settings", &serde_json::to_string(&own)?])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()?;
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let id = Pid::from_raw(child.id().unwrap() as i32).unwrap();
        let (sender, words) = unbounded_channel();
        tokio::spawn(async move {
            let mut lines = BufReader::new(output).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                // A line may be cut short when its writer is killed.
                if let Ok(word) = serde_json::from_str(&line) {
                    let _ = sender.send(word);
                }
            }
        });
        let mut member = Self { settings, life, child, input, words, id };
        match member.word(PATIENCE).await {
            Some(Word::Ready) => Ok(member),
            other => Err(format!("{} did not start: {other:?}", own.name).into()),
        }
    }

    /// Tells it something. One that is dead does not hear it.
    pub async fn tell(&mut self, order: Order) {
        let mut line = serde_json::to_string(&order).unwrap();
        line.push('\n');
        let _ = self.input.write_all(line.as_bytes()).await;
    }

    /// The next thing it says.
    pub async fn word(&mut self, within: Duration) -> Option<Word> {
        timeout(within, self.words.recv()).await.ok().flatten()
    }

    pub fn signal(&self, signal: Signal) {
        // It fails only where the process has ended.
        let _ = kill_process(self.id, signal);
    }

    /// Waits until it stops itself while it holds a key. Returns the key.
    pub async fn stopped_at_seam(&mut self, within: Duration) -> Option<String> {
        self.tell(Order::Stop).await;
        let Some(Word::Stopping { key }) = self.word(within).await else { return None };
        // Continued before it has stopped, it would stop for ever.
        let deadline = Instant::now() + within;
        while !self.is_stopped() && Instant::now() < deadline {
            sleep(Duration::from_millis(1)).await;
        }
        Some(key)
    }

    fn is_stopped(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.id)).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
    }

    /// Kills it (SIGKILL) and starts another one in its place.
    pub async fn replace(mut self) -> Result<Self> {
        self.child.kill().await?;
        Self::start_as(self.settings, self.life + 1).await
    }

    /// Lets it end in peace, and says how it did.
    pub async fn end(mut self) -> Result<ExitStatus> {
        self.signal(Signal::CONT);
        self.tell(Order::Last).await;
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.signal(Signal::CONT);
            let nudge = (Instant::now() + NUDGE).min(deadline);
            match timeout_at(nudge, self.child.wait()).await {
                Ok(status) => return Ok(status?),
                Err(_) if Instant::now() < deadline => {}
                Err(_) => return Err(format!("{} does not end", self.settings.name).into()),
            }
        }
    }
}

/// The members that nothing is being done to. Whoever does something takes one out for the time.
#[derive(Debug)]
pub struct Pool {
    free: Mutex<Vec<Member>>,
    returned: Notify,
}

impl Pool {
    pub fn new(members: Vec<Member>) -> Self {
        Self { free: Mutex::new(members), returned: Notify::new() }
    }

    /// Takes any of them, and waits for one if none is free.
    pub async fn take(&self, random: &mut fastrand::Rng) -> Member {
        loop {
            let returned = self.returned.notified();
            {
                let mut free = self.free.lock().unwrap();
                if !free.is_empty() {
                    let at = random.usize(..free.len());
                    let mut member = free.swap_remove(at);
                    // It may have stopped itself when nobody waited for that any more.
                    while member.words.try_recv().is_ok() {
                        member.signal(Signal::CONT);
                    }
                    return member;
                }
            }
            returned.await;
        }
    }

    pub fn give_back(&self, member: Member) {
        self.free.lock().unwrap().push(member);
        self.returned.notify_one();
    }

    /// All of them, when nothing is being done any more.
    pub fn dissolve(self) -> Vec<Member> {
        self.free.into_inner().unwrap()
    }
}
