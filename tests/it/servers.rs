//! The test servers themselves: what other tests lean on.

use std::io::Read;
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::support::{Directory, PostgresServer, RedisServer, wait_until};

const SOON: Duration = Duration::from_secs(20);

fn is_running(id: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{id}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn a_redis_server_answers_and_ends_with_its_handle() {
    let server = RedisServer::start();
    assert_eq!(server.command(&["PING"]), "PONG");
    assert_eq!(server.command(&["SET", "a", "1"]), "OK");
    assert_eq!(server.command(&["MGET", "a", "b"]), "1\n(nil)");
    assert!(server.try_command(&["INCR"]).unwrap_err().starts_with("ERR"));
    assert_eq!(server.url(), format!("redis://127.0.0.1:{}", server.port()));
    let id = server.process_id();
    drop(server);
    assert!(!is_running(id));
}

#[test]
fn a_redis_server_takes_further_arguments() {
    let server = RedisServer::start_with(&["--requirepass", "secret", "--maxmemory", "5mb"]);
    assert_eq!(server.command(&["CONFIG", "GET", "maxmemory"]), "maxmemory\n5242880");
    assert_eq!(server.url(), format!("redis://:secret@127.0.0.1:{}", server.port()));
}

#[test]
fn two_redis_servers_do_not_share_data() {
    let (one, other) = (RedisServer::start(), RedisServer::start());
    one.command(&["SET", "a", "1"]);
    assert_eq!(other.command(&["GET", "a"]), "(nil)");
}

#[test]
fn a_killed_redis_server_comes_back_empty_on_its_port() {
    let server = RedisServer::start();
    server.command(&["SET", "a", "1"]);
    let port = server.port();
    server.kill();
    assert!(server.try_command(&["PING"]).is_err());
    server.restart_empty();
    assert_eq!(server.port(), port);
    assert_eq!(server.command(&["GET", "a"]), "(nil)");
}

#[test]
fn a_stopped_redis_server_says_nothing_until_it_goes_on() {
    let server = RedisServer::start();
    server.stop();
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, server.port())).unwrap();
    std::io::Write::write_all(&mut stream, b"PING\r\n").unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut reply = [0; 7];
    assert!(stream.read_exact(&mut reply).is_err());
    server.cont();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(&reply, b"+PONG\r\n");
}

#[test]
fn a_postgres_server_answers_and_ends_with_its_handle() {
    let server = PostgresServer::start();
    assert_eq!(server.execute("SELECT 1, 'a'"), "1|a");
    assert_eq!(server.execute("SHOW max_prepared_transactions"), "20");
    let url = server.create_database("bank");
    assert_eq!(url, format!("postgres://postgres@127.0.0.1:{}/bank", server.port()));
    assert_eq!(server.execute("SELECT count(*) FROM pg_database WHERE datname = 'bank'"), "1");
    let id = server.process_id();
    drop(server);
    assert!(!is_running(id));
}

#[test]
fn a_postgres_server_takes_further_settings() {
    let server = PostgresServer::start_with(&["max_prepared_transactions=0"]);
    assert_eq!(server.execute("SHOW max_prepared_transactions"), "0");
}

#[test]
fn a_killed_postgres_server_comes_back_with_what_was_committed() {
    let server = PostgresServer::start();
    server.execute("CREATE TABLE t AS SELECT 7 AS x");
    server.kill();
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, server.port())).is_err());
    server.restart();
    assert_eq!(server.execute("SELECT x FROM t"), "7");
    server.restart();
    assert_eq!(server.execute("SELECT x FROM t"), "7");
}

#[tokio::test]
async fn a_stopped_postgres_server_says_nothing_until_it_goes_on() {
    let server = std::sync::Arc::new(PostgresServer::start());
    server.stop();
    let asked = std::sync::Arc::clone(&server);
    let answer = tokio::task::spawn_blocking(move || asked.execute("SELECT 1"));
    assert!(!answer.is_finished());
    server.cont();
    assert_eq!(answer.await.unwrap(), "1");
}

const REPORT: &str = "PALISADE_TEST_REPORT";

#[tokio::test]
async fn servers_die_with_a_test_process_that_is_killed() {
    if let Some(report) = std::env::var_os(REPORT) {
        wait_to_be_killed_with_servers(Path::new(&report));
    }
    let directory = Directory::new();
    let report = directory.path().join("report");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "servers::servers_die_with_a_test_process_that_is_killed"])
        .env(REPORT, &report)
        // So that what it cannot clean up goes with our own directory.
        .env("TMPDIR", directory.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_until("the other process has its servers", SOON, async || report.exists()).await;
    let ids = std::fs::read_to_string(&report).unwrap();
    let ids: Vec<u32> = ids.split(' ').map(|id| id.parse().unwrap()).collect();
    assert!(ids.iter().all(|id| is_running(*id)));
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until("its servers are gone", SOON, async || !ids.iter().any(|id| is_running(*id))).await;
}

/// The part of the process that is killed.
fn wait_to_be_killed_with_servers(report: &Path) -> ! {
    let redis = RedisServer::start();
    let postgres = PostgresServer::start();
    // Renamed into place, so that whoever sees the file sees all of it.
    let part = report.with_extension("part");
    std::fs::write(&part, format!("{} {}", redis.process_id(), postgres.process_id())).unwrap();
    std::fs::rename(&part, report).unwrap();
    loop {
        std::thread::park();
    }
}
