//! Two processes, each with many requests for one key: nobody is overtaken, and what happens to one
//! of them costs the other a lease at most.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use palisade::{LockGuard, Locks};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::support::{RedisServer, program, wait_until};

/// What is waited for where a process dies or stops. A machine that is busy for as long as this
/// would cost a request its place in the line.
const LEASE: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_secs(60);

struct Process {
    child: Child,
    input: ChildStdin,
    lines: UnboundedReceiver<String>,
}

impl Process {
    fn start(server: &RedisServer, lease: Duration) -> Self {
        let (url, lease) = (server.url(), lease.as_millis().to_string());
        let mut child = Command::new(program("crowd"))
            .args([url.as_str(), &lease, "k"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the example `crowd` is built beside the tests");
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (read, lines) = unbounded_channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                // The test may have ended.
                let _ = read.send(line.unwrap());
            }
        });
        Self { child, input, lines }
    }

    fn tell(&mut self, order: &str) {
        writeln!(self.input, "{order}").unwrap();
    }

    /// The next line, without its first word, which is `word`.
    async fn reads(&mut self, word: &str) -> String {
        let line = tokio::time::timeout(SOON, self.lines.recv()).await;
        let line = line.unwrap_or_else(|_| panic!("nothing, instead of {word}")).unwrap();
        let rest = line.strip_prefix(word).unwrap_or_else(|| panic!("{line}, instead of {word}"));
        rest.trim().to_owned()
    }

    /// Whose turn it is, and with which token.
    async fn held(&mut self) -> (u64, String) {
        let held = self.reads("held").await;
        let (name, token) = held.split_once(' ').unwrap();
        (token.parse().unwrap(), name.to_owned())
    }

    fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Two processes, and a third that holds the key at first.
struct Scene {
    _server: RedisServer,
    locks: Locks,
    first: Option<LockGuard>,
    a: Process,
    b: Process,
}

impl Scene {
    async fn new(lease: Duration) -> Self {
        let server = RedisServer::start();
        let locks = palisade::connect(&server.url()).await.unwrap();
        let first = Some(locks.lock("k").ttl(SOON).acquire().await.unwrap());
        let (a, b) = (Process::start(&server, lease), Process::start(&server, lease));
        Self { _server: server, locks, first, a, b }
    }

    /// Has `name`, which begins with the name of its process, ask; then so many stand in line.
    async fn ask(&mut self, what: &str, name: &str, in_line: usize) {
        let process = if name.starts_with('a') { &mut self.a } else { &mut self.b };
        process.tell(&format!("{what} {name}"));
        assert_eq!(process.reads("asked").await, name);
        wait_until(&format!("{in_line} are in line"), SOON, async || {
            self.locks.inspect("k").await.unwrap().waiters.len() == in_line
        })
        .await;
    }

    async fn go(&mut self) {
        self.first.take().unwrap().release().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_overtaken_by_those_who_pass_a_lock_among_themselves() {
    let mut scene = Scene::new(SOON).await;
    // The first of each process asks for itself, and the next for all who come until somebody of
    // the other process stands behind them.
    let order = [
        ("a1", 1),
        ("a2", 2),
        ("a3", 2),
        ("a4", 2),
        ("b1", 3),
        ("a5", 4),
        ("b2", 5),
        ("b3", 5),
        ("a6", 6),
        ("a7", 6),
        ("b4", 7),
    ];
    for (name, in_line) in order {
        scene.ask("pass", name, in_line).await;
    }
    scene.go().await;
    let mut served = Vec::new();
    for (name, _) in order {
        let process = if name.starts_with('a') { &mut scene.a } else { &mut scene.b };
        served.push(process.held().await);
    }
    served.sort();
    let names: Vec<_> = served.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, order.map(|(name, _)| name));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_is_killed_while_it_passes_a_lock_on_costs_a_lease() {
    let mut scene = Scene::new(LEASE).await;
    for (what, name, in_line) in
        [("pass", "a1", 1), ("keep", "a2", 2), ("pass", "a3", 2), ("pass", "b1", 3)]
    {
        scene.ask(what, name, in_line).await;
    }
    scene.go().await;
    scene.a.held().await;
    let (token, name) = scene.a.held().await;
    assert_eq!(name, "a2");
    scene.a.signal("-KILL");
    let (later, name) = scene.b.held().await;
    assert!(name == "b1" && later > token, "{name}: {later} after {token}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_was_stopped_passes_nothing_on_that_somebody_else_got_meanwhile() {
    let mut scene = Scene::new(LEASE).await;
    for (what, name, in_line) in [
        ("pass", "a1", 1),
        ("keep", "a2", 2),
        ("pass", "a3", 2),
        ("pass", "a4", 2),
        ("keep", "b1", 3),
    ] {
        scene.ask(what, name, in_line).await;
    }
    scene.go().await;
    scene.a.held().await;
    let (stopped, _) = scene.a.held().await;
    scene.a.signal("-STOP");
    let (overtook, _) = scene.b.held().await;
    assert!(overtook > stopped);
    // What it is told while it is stopped, it reads when it wakes up.
    scene.a.tell("release");
    scene.a.signal("-CONT");
    scene.a.reads("LeaseLost").await;
    wait_until("those behind it stand in line anew", SOON, async || {
        scene.locks.inspect("k").await.unwrap().waiters.len() == 1
    })
    .await;
    scene.b.tell("release");
    scene.b.reads("released").await;
    let (third, fourth) = (scene.a.held().await, scene.a.held().await);
    assert_eq!((third.1.as_str(), fourth.1.as_str()), ("a3", "a4"));
    assert!(third.0 > overtook && fourth.0 > third.0, "{overtook}, {third:?}, {fourth:?}");
}
