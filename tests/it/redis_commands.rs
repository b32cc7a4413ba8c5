//! What is sent for an operation, and how long the server takes for it.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use palisade::Mode;
use palisade::backend::LockBackend;
use palisade::protocol::{Acquire, Acquired, Released, Renewed};

use crate::redis_asks::{Client, P0, connect, key, left, renew, tokens};
use crate::support::RedisServer;

use Mode::{Exclusive as X, Shared as S};

/// Sees every command that clients send to a server, in order.
struct Monitor {
    lines: BufReader<TcpStream>,
    server: u16,
}

impl Monitor {
    fn of(server: &RedisServer) -> Self {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, server.port())).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(b"MONITOR\r\n").unwrap();
        let mut monitor = Self { lines: BufReader::new(stream), server: server.port() };
        assert_eq!(monitor.line(), "+OK");
        monitor
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// The names of the commands that were sent since the last call; those that scripts call are
    /// not among them.
    fn sent(&mut self) -> Vec<String> {
        let mut marker = TcpStream::connect((Ipv4Addr::LOCALHOST, self.server)).unwrap();
        marker.write_all(b"ECHO the-end-of-it\r\n").unwrap();
        let mut sent = Vec::new();
        loop {
            let line = self.line();
            let (from, command) = line.split_once("] ").unwrap();
            if command == "\"ECHO\" \"the-end-of-it\"" {
                return sent;
            }
            if !from.ends_with("lua") {
                sent.push(command.split('"').nth(1).unwrap().to_owned());
            }
        }
    }
}

#[tokio::test]
async fn an_uncontended_lock_of_up_to_64_keys_is_two_commands_and_leaves_nothing() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let mut monitor = Monitor::of(&server);
    for n in [1, 4, 16, 64] {
        let names: Vec<_> = (0..n).map(|n| format!("account:{n}")).collect();
        for modes in [[X, X], [S, S], [X, S]] {
            let pairs = names.iter().enumerate();
            let wants: Vec<_> = pairs.map(|(at, key)| (key.as_str(), modes[at % 2])).collect();
            let ask = client.ask(&wants);
            assert_eq!(tokens(&redis.acquire(&ask).await.unwrap()).len(), n);
            assert_eq!(redis.release(&ask.part).await.unwrap(), Released::Released);
            assert_eq!(monitor.sent(), ["EVALSHA", "EVALSHA"], "{n} keys, {modes:?}");
            assert_eq!(left(&server), [""; 0]);
            assert_eq!(monitor.sent(), ["KEYS"]);
        }
    }
    assert_eq!(server.command(&["DBSIZE"]), "2", "the token counter and the number of partitions");
    assert_eq!(server.command(&["TTL", "palisade:{0}:t"]), "-1");
}

#[tokio::test]
async fn a_hundred_leases_are_renewed_by_one_command() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let mut renewals = Vec::new();
    for n in 0..100 {
        let ask = client.ask(&[(&format!("key {n}"), X)]);
        tokens(&redis.acquire(&ask).await.unwrap());
        renewals.push(crate::redis_asks::renewal(&ask, false));
    }
    let mut monitor = Monitor::of(&server);
    let renewed = redis.renew(P0, &renewals).await.unwrap();
    assert!(renewed.iter().all(|answer| *answer == Renewed::Held(None)));
    assert_eq!(monitor.sent(), ["EVALSHA"]);
}

#[tokio::test]
async fn a_hand_over_is_one_command_and_one_push() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let (first, second) = (client.ask(&[("k", X)]), client.ask(&[("k", X)]));
    tokens(&redis.acquire(&first).await.unwrap());
    assert!(matches!(redis.acquire(&second).await.unwrap(), Acquired::Queued { .. }));
    let mut monitor = Monitor::of(&server);
    redis.release(&first.part).await.unwrap();
    assert!(client.was_told(&second), "the push comes before the answer on the same connection");
    assert_eq!(monitor.sent(), ["EVALSHA"]);
}

/// How many commands the server has run so far, those that scripts call among them, other than to
/// answer this.
fn calls(server: &RedisServer) -> usize {
    let stats = server.command(&["INFO", "commandstats"]);
    let lines = stats.lines().filter(|line| !line.starts_with("cmdstat_info:"));
    let calls = lines.filter_map(|line| line.split("calls=").nth(1)?.split(',').next());
    calls.map(|calls| calls.parse::<usize>().unwrap()).sum()
}

#[tokio::test]
async fn whoever_comes_and_goes_at_a_key_in_demand_costs_the_server_few_calls() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let asks: Vec<_> = (0..5).map(|_| client.ask(&[("k", X)])).collect();
    for ask in &asks[..3] {
        redis.acquire(ask).await.unwrap();
    }
    let joined = calls(&server);
    assert!(matches!(redis.acquire(&asks[3]).await.unwrap(), Acquired::Queued { position: 2, .. }));
    let joined = calls(&server) - joined;
    assert_eq!(client.followed().last().unwrap().request, asks[2].part.request);
    for (now, next) in [(0, 1), (1, 2), (2, 3)] {
        let handed = calls(&server);
        assert_eq!(redis.release(&asks[now].part).await.unwrap(), Released::Released);
        let handed = calls(&server) - handed;
        assert!(client.was_told(&asks[next]));
        let confirmed = calls(&server);
        assert_eq!(renew(&redis, &asks[next], false).await, Renewed::Held(None));
        let confirmed = calls(&server) - confirmed;
        println!("calls: to join {joined}, to hand over {handed}, to confirm {confirmed}");
        // With the EVALSHA itself.
        assert!(joined <= 19 && handed <= 15 && confirmed <= 5);
        let seen = redis.inspect(P0, &key("k")).await.unwrap();
        assert_eq!(seen.holders[0].request, asks[next].part.request);
        assert!(seen.holders[0].expires_in > asks[next].lease.claim());
        assert_eq!(seen.waiters.len(), 3 - next);
    }
    assert_eq!(redis.release(&asks[3].part).await.unwrap(), Released::Released);
    assert_eq!(left(&server), [""; 0]);
}

/// The µs that the server has spent in scripts so far.
fn script_time(server: &RedisServer) -> f64 {
    let stats = server.command(&["INFO", "commandstats"]);
    let line = stats.lines().find(|line| line.starts_with("cmdstat_evalsha:"));
    let Some(line) = line else { return 0.0 };
    let usec = line.split(',').find_map(|part| part.strip_prefix("usec=")).unwrap();
    usec.parse().unwrap()
}

#[tokio::test]
async fn a_thousand_readers_cost_each_of_them_little_more_than_ten_do() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let mut readers: Vec<Acquire> = Vec::new();
    let mut costs = Vec::new();
    for n in 0..1000 {
        let ask = client.ask(&[("k", S)]);
        let before = script_time(&server);
        tokens(&redis.acquire(&ask).await.unwrap());
        costs.push(script_time(&server) - before);
        readers.push(ask);
        assert!(n < 5 || costs[n] > 0.0);
    }
    let median = |costs: &[f64]| {
        let mut costs = costs.to_vec();
        costs.sort_by(f64::total_cmp);
        costs[costs.len() / 2]
    };
    let (few, many) = (median(&costs[5..25]), median(&costs[980..1000]));
    println!("acquire: {few} µs beside 15 readers, {many} µs beside 990");
    assert!(many < 5.0 * few, "{few} µs, {many} µs");
    let before = script_time(&server);
    for reader in &readers[..20] {
        assert_eq!(renew(&redis, reader, false).await, Renewed::Held(None));
    }
    let renewals = (script_time(&server) - before) / 20.0;
    let before = script_time(&server);
    for reader in &readers[..20] {
        assert_eq!(redis.release(&reader.part).await.unwrap(), Released::Released);
    }
    let releases = (script_time(&server) - before) / 20.0;
    println!("renew: {renewals} µs, release: {releases} µs beside 980 readers");
    assert!(renewals < 10.0 * few && releases < 10.0 * few, "{few}, {renewals}, {releases}");
    for reader in &readers[20..] {
        redis.release(&reader.part).await.unwrap();
    }
    assert_eq!(left(&server), [""; 0]);
}

#[tokio::test]
async fn a_thousand_waiters_cost_the_next_one_little_more_than_ten_do() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    tokens(&redis.acquire(&client.ask(&[("k", X)])).await.unwrap());
    let mut costs = Vec::new();
    for _ in 0..1000 {
        let ask = client.ask(&[("k", X)]);
        let before = script_time(&server);
        redis.acquire(&ask).await.unwrap();
        costs.push(script_time(&server) - before);
    }
    let median = |costs: &[f64]| {
        let mut costs = costs.to_vec();
        costs.sort_by(f64::total_cmp);
        costs[costs.len() / 2]
    };
    let (few, many) = (median(&costs[5..25]), median(&costs[980..1000]));
    println!("queued: {few} µs behind 15 waiters, {many} µs behind 990");
    assert!(many < 5.0 * few, "{few} µs, {many} µs");
}
