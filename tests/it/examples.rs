//! The main example as a user runs it: every transfer is applied exactly once, whatever is killed.
//!
//! It ends with a status that says whether the balances equal those of a sequential replay.

use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use crate::support::{
    Directory, PostgresServer, RedisServer, children, is_alive, program, wait_until,
};

fn bank_transfer(arguments: &[&str]) -> Command {
    let mut command = Command::new(program("bank_transfer"));
    command.args(arguments).stdin(Stdio::null());
    command
}

/// What it printed, after it has ended well.
fn run(arguments: &[&str]) -> String {
    let Output { status, stdout, stderr } = bank_transfer(arguments).output().unwrap();
    let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    assert!(status.success(), "{arguments:?}: {status}\n{stdout}\n{stderr}");
    assert!(stdout.contains("balances equal the replay: yes\n"), "{stdout}");
    assert!(!stderr.contains("warning"), "{stderr}");
    stdout
}

#[test]
fn transfers_end_as_their_replay_with_nothing_installed() {
    let said = run(&["--limit", "2000"]);
    assert!(said.contains("applied            2000, of which 8 were refused"), "{said}");
    assert!(said.contains("account:merchant-01"), "the hottest key is named: {said}");
}

#[test]
fn processes_with_locks_of_their_own_are_kept_apart_by_the_fence() {
    let said = run(&["--limit", "1000", "--processes", "2"]);
    assert!(!said.contains("stale rejections   0\n"), "they met: {said}");
}

#[test]
fn workers_are_killed_and_stopped_and_every_transfer_is_applied_once() {
    let (redis, postgres) = (RedisServer::start(), PostgresServer::start());
    redis.command(&["SET", "mine", "untouched"]);
    let (locks, store) = (redis.url(), postgres.url());
    let said = run(&[
        "--locks",
        &locks,
        "--store",
        &store,
        "--processes",
        "4",
        "--kill",
        "--limit",
        "1500",
    ]);
    assert!(said.contains("only workers will be killed"), "{said}");
    assert!(!said.contains("workers killed 0,"), "{said}");
    assert_eq!(redis.command(&["GET", "mine"]), "untouched", "a server of others is not harmed");
}

#[test]
fn redis_is_killed_too_and_comes_back_empty_and_every_transfer_is_applied_once() {
    let said = run(&[
        "--locks",
        "redis:",
        "--store",
        "postgres:",
        "--processes",
        "4",
        "--kill",
        "--limit",
        "1500",
    ]);
    assert!(!said.contains("workers killed 0,") && !said.contains("Redis killed 0"), "{said}");
}

#[test]
fn redis_is_away_for_half_of_the_time_and_the_work_goes_on() {
    let said = run(&[
        "--locks",
        "redis:",
        "--store",
        "postgres:",
        "--processes",
        "4",
        "--kill",
        "--fallback",
        "store-fence",
        "--limit",
        "1200",
    ]);
    println!("{said}");
    assert!(!said.contains("Redis killed 0") && !said.contains("ran degraded       0\n"), "{said}");
}

#[test]
fn bad_input_is_refused_with_what_helps() {
    for (arguments, word) in [
        (["--file", "/nowhere/transfers.csv"], "/nowhere/accounts.csv"),
        (["--store", "mongodb://localhost"], "use sqlite: or postgres:"),
        (["--locks", "zookeeper:2181"], "no lock service"),
        (["--tasks", "0"], "--tasks"),
    ] {
        let Output { status, stderr, .. } = bank_transfer(&arguments).output().unwrap();
        let said = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(2), "{said}");
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn a_file_whose_outcome_depends_on_the_order_is_refused() {
    let directory = Directory::new();
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    write("accounts.csv", "account,opening_cents\na,5\nb,90\n");
    let file = write("t.csv", "id,from,to,amount_cents,memo\n1,b,a,9,\"x, y\"\n2,a,b,9,\n");
    let output = bank_transfer(&["--file", file.to_str().unwrap()]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("account \"a\" opens with 5"), "{said}");
    // Without the second transfer, the first may come whenever it likes.
    run(&["--file", file.to_str().unwrap(), "--limit", "1"]);
}

#[tokio::test]
async fn what_it_started_dies_with_it() {
    let arguments = ["--locks", "redis:", "--processes", "3"];
    // So that the file that it cannot clean up goes with our own directory.
    let directory = Directory::new();
    let mut command = bank_transfer(&arguments);
    command.env("TMPDIR", directory.path()).stdout(Stdio::null());
    let mut parent = command.spawn().map(Parent).unwrap();
    let id = parent.0.id();
    let all = 4; // Redis and three workers
    let soon = Duration::from_secs(20);
    wait_until("it has its workers", soon, async || children(id).len() == all).await;
    let started = children(id);
    parent.0.kill().unwrap();
    parent.0.wait().unwrap();
    let gone = async || !started.iter().any(|id| is_alive(*id));
    wait_until("they are gone", soon, gone).await;
}

/// Ended with the test, also if it fails.
struct Parent(Child);

impl Drop for Parent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
