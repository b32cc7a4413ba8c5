//! The workers: tasks of this process or processes of their own, and what they say.

use std::process::{ExitStatus, Stdio};

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;

use crate::Result;
use crate::input::Transfer;
use crate::options::Options;
use crate::report::Report;
use crate::worker;

/// All workers. Dropped, it takes them along.
pub struct Crew {
    options: Options,
    members: Vec<Member>,
    sender: UnboundedSender<(usize, Word)>,
    words: UnboundedReceiver<(usize, Word)>,
}

enum Member {
    Task(JoinHandle<Result<()>>),
    Process { child: Child, killed: bool },
    Finished,
}

/// What is heard of a worker.
enum Word {
    Report(Report),
    /// It will say nothing more.
    Silence,
}

impl Crew {
    /// Starts the workers.
    pub fn start(options: &Options, transfers: &[Transfer]) -> Result<Self> {
        let (sender, words) = unbounded_channel();
        let mut crew = Self { options: options.clone(), members: Vec::new(), sender, words };
        if !options.has_workers() {
            let task = crew.task(transfers.to_vec());
            crew.members.push(task);
            return Ok(crew);
        }
        for number in 0..options.processes as usize {
            let process = crew.process(number)?;
            crew.members.push(process);
        }
        Ok(crew)
    }

    /// The next report and whose it is; `None` when all have finished. Workers that were killed are
    /// started again.
    ///
    /// Dropping the future loses nothing but the wait.
    pub async fn next(&mut self) -> Result<Option<(usize, Report)>> {
        while self.members.iter().any(Member::is_working) {
            let Some((number, word)) = self.words.recv().await else { break };
            match word {
                Word::Report(report) => return Ok(Some((number, report))),
                Word::Silence => self.part_with(number).await?,
            }
        }
        Ok(None)
    }

    /// The numbers of those that work in processes of their own.
    pub fn working(&self) -> Vec<usize> {
        let is_process = |number: &usize| {
            self.members.get(*number).is_some_and(|member| matches!(member, Member::Process { .. }))
        };
        (0..self.members.len()).filter(is_process).collect()
    }

    /// Kills a worker (SIGKILL), which does nothing any more from here on.
    pub fn kill(&mut self, number: usize) -> Result<()> {
        if let Some(Member::Process { child, killed }) = self.members.get_mut(number) {
            *killed = true;
            child.start_kill()?;
        }
        Ok(())
    }

    /// Stops a worker where it stands (`STOP`), or lets it go on (`CONT`).
    pub fn signal(&self, number: usize, signal: &str) -> Result<()> {
        if let Some(Member::Process { child, .. }) = self.members.get(number)
            && let Some(id) = child.id()
        {
            // A shell, because the standard library can only kill.
            let script = format!("kill -{signal} {id} 2>/dev/null || true");
            std::process::Command::new("sh").arg("-c").arg(script).status()?;
        }
        Ok(())
    }

    async fn part_with(&mut self, number: usize) -> Result<()> {
        let member = self.members.get_mut(number).ok_or("a worker that was started")?;
        match std::mem::replace(member, Member::Finished) {
            Member::Task(task) => task.await??,
            Member::Process { mut child, killed } => {
                let status: ExitStatus = child.wait().await?;
                if killed && !status.success() {
                    self.members[number] = self.process(number)?;
                } else if !status.success() {
                    return Err(format!("worker {number} failed: {status}").into());
                }
            }
            Member::Finished => {}
        }
        Ok(())
    }

    fn task(&self, transfers: Vec<Transfer>) -> Member {
        let (options, sender) = (self.options.clone(), self.sender.clone());
        Member::Task(tokio::spawn(async move {
            let tell = |word| Ok(sender.send((0, word))?);
            let report = |report| tell(Word::Report(report));
            let worked = worker::work(&options, 0, &transfers, report).await;
            worked.and(tell(Word::Silence))
        }))
    }

    fn process(&self, number: usize) -> Result<Member> {
        let Options { locks, store, tasks, processes, limit, file, kill, fallback, .. } =
            &self.options;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["--locks", locks, "--store", store])
            .args(["--tasks", &tasks.to_string(), "--processes", &processes.to_string()])
            .arg("--file")
            .arg(file)
            .args(["--worker", &number.to_string()])
            .args(limit.iter().flat_map(|limit| ["--limit".to_owned(), limit.to_string()]))
            .args(["--fallback", fallback.name()])
            .args(kill.then_some("--kill"))
            // Held open; its end tells the worker that this process is gone.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn()?;
        let output = child.stdout.take().ok_or("the output is piped")?;
        let sender = self.sender.clone();
        tokio::spawn(async move {
            let mut lines = BufReader::new(output).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                // A line may be cut short when its writer is killed.
                if let Ok(report) = serde_json::from_str(&line) {
                    let _ = sender.send((number, Word::Report(report)));
                }
            }
            let _ = sender.send((number, Word::Silence));
        });
        Ok(Member::Process { child, killed: false })
    }
}

impl Member {
    fn is_working(&self) -> bool {
        !matches!(self, Member::Finished)
    }
}
