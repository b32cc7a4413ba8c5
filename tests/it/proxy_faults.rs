//! The fault proxy does what it says: a fault that strikes nothing proves nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::{Fault, Harm, Point, Proxy, Rates, RedisServer, Side, wait_until};

const SOON: Duration = Duration::from_secs(10);
/// Long enough for a reply on loopback, so that what is not there by then was held back.
const A_MOMENT: Duration = Duration::from_millis(100);

/// What a client finds when it reads.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Bytes(Vec<u8>),
    Closed,
    Silence,
}

struct Bench {
    server: RedisServer,
    proxy: Proxy,
}

impl Bench {
    async fn new() -> Self {
        let server = RedisServer::start();
        let proxy = Proxy::start(server.port()).await;
        Self { server, proxy }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.proxy.port())).await.unwrap()
    }

    /// Sends one INCR, which is struck if there is a fault for it. Says what came back, and whether
    /// the server counted.
    async fn count(&self, fault: Option<Fault>) -> (Seen, bool, TcpStream) {
        let before = self.counted();
        let mut client = self.connect().await;
        if let Some(fault) = fault {
            self.proxy.plan("INCR", fault);
        }
        client.write_all(b"INCR n\r\n").await.unwrap();
        if fault.is_some() {
            self.proxy.happened().await;
        }
        let seen = read(&mut client).await;
        (seen, self.counted() > before, client)
    }

    fn counted(&self) -> u64 {
        self.server.command(&["GET", "n"]).parse().unwrap_or(0)
    }

    /// How many connections the server sees, beside the one that asks.
    fn connections(&self) -> usize {
        self.server.command(&["CLIENT", "LIST"]).lines().count() - 1
    }
}

async fn read(client: &mut TcpStream) -> Seen {
    let mut buffer = vec![0; 64];
    match timeout(A_MOMENT, client.read(&mut buffer)).await {
        Err(_) => Seen::Silence,
        Ok(Ok(0) | Err(_)) => Seen::Closed,
        Ok(Ok(n)) => Seen::Bytes(buffer[..n].to_vec()),
    }
}

#[tokio::test]
async fn each_way_to_end_a_connection_ends_the_sides_that_it_names() {
    use Side::{Client, Server};
    let b = Bench::new().await;
    for at in [Point::Request, Point::HalfRequest, Point::Reply] {
        let reached = at == Point::Reply;
        // What the client sees, and whether the server still sees a connection.
        for (harm, sees, stays) in [
            (Harm::Cut, Seen::Closed, false),
            (Harm::Reset, Seen::Closed, false),
            (Harm::Drop, Seen::Silence, true),
            (Harm::HalfOpen(Client), Seen::Closed, true),
            (Harm::HalfOpen(Server), Seen::Silence, false),
        ] {
            let (seen, counted, _client) = b.count(Some(Fault::At(at, harm))).await;
            assert_eq!((seen, counted), (sees, reached), "{harm:?} at {at:?}");
            let what = format!("the server's side is as it should be, {harm:?} at {at:?}");
            wait_until(&what, SOON, async || (b.connections() == 1) == stays).await;
            b.proxy.calm();
            wait_until("calm closes the rest", SOON, async || b.connections() == 0).await;
        }
    }
}

#[tokio::test]
async fn half_a_reply_is_half_and_after_it_the_reply_is_whole() {
    let b = Bench::new().await;
    let (half, counted, _client) = b.count(Some(Fault::At(Point::HalfReply, Harm::Cut))).await;
    assert_eq!((half, counted), (Seen::Bytes(b":1".to_vec()), true));
    let (whole, _, mut client) = b.count(Some(Fault::At(Point::After, Harm::Cut))).await;
    assert_eq!(whole, Seen::Bytes(b":2\r\n".to_vec()));
    assert_eq!(read(&mut client).await, Seen::Closed);
}

#[tokio::test]
async fn what_is_delayed_arrives_late_and_at_once_when_the_network_is_calmed() {
    let b = Bench::new().await;
    for at in [Point::Request, Point::HalfRequest, Point::Reply] {
        let fault = Fault::At(at, Harm::Delay(3 * A_MOMENT));
        let (seen, counted, mut client) = b.count(Some(fault)).await;
        assert_eq!((seen, counted), (Seen::Silence, at == Point::Reply), "{at:?}");
        let mut reply = [0; 4];
        timeout(SOON, client.read_exact(&mut reply)).await.unwrap().unwrap();
    }
    let (_, _, mut client) = b.count(Some(Fault::At(Point::Request, Harm::Delay(60 * SOON)))).await;
    b.proxy.calm();
    timeout(SOON, client.read_exact(&mut [0; 4])).await.unwrap().unwrap();
    assert_eq!(b.counted(), 4);
}

#[tokio::test]
async fn a_trickle_takes_its_time_for_each_byte() {
    let b = Bench::new().await;
    let pause = Duration::from_millis(20);
    for (at, bytes) in [(Point::Request, 8), (Point::HalfRequest, 4), (Point::Reply, 3)] {
        let started = Instant::now();
        b.proxy.plan("INCR", Fault::At(at, Harm::Trickle(pause)));
        let mut client = b.connect().await;
        client.write_all(b"INCR n\r\n").await.unwrap();
        timeout(SOON, client.read_exact(&mut [0; 4])).await.unwrap().unwrap();
        assert!(started.elapsed() >= pause * bytes, "{at:?}: {:?}", started.elapsed());
    }
}

#[tokio::test]
async fn noise_replaces_the_reply_and_never_the_request() {
    let b = Bench::new().await;
    for at in Point::ALL {
        let garbage = Fault::At(at, Harm::Garbage(7));
        let (seen, counted, _client) = b.count(Some(garbage)).await;
        assert!(counted, "{at:?}");
        let Seen::Bytes(bytes) = seen else { panic!("{at:?}: {seen:?}") };
        let valid = format!(":{}\r\n", b.counted());
        match at {
            Point::HalfReply => assert_eq!(bytes[..2], valid.as_bytes()[..2]),
            Point::After => assert_eq!(bytes[..4], *valid.as_bytes()),
            _ => assert_ne!(bytes, valid.as_bytes()),
        }
    }
}

#[tokio::test]
async fn only_the_request_that_was_planned_for_is_struck() {
    let b = Bench::new().await;
    b.proxy.plan_nth(2, "INCR", Fault::LoseReply);
    let mut client = b.connect().await;
    let mut seen = Vec::new();
    for request in ["INCR n\r\n", "PING\r\n", "INCR n\r\n", "PING\r\n", "INCR n\r\n"] {
        client.write_all(request.as_bytes()).await.unwrap();
        seen.push(read(&mut client).await);
    }
    assert!(matches!(seen[3], Seen::Bytes(_)), "{seen:?}");
    assert_eq!(seen[4], Seen::Closed);
    assert_eq!(b.counted(), 3, "the server has seen it");
    assert_eq!(b.proxy.struck(), BTreeMap::from([("lose reply", 1)]));
}

/// Sends `requests` one by one, each on a connection of its own. Says what struck them, and how
/// many the server has seen in the end.
async fn run(seed: u64, requests: u64) -> (BTreeMap<&'static str, usize>, u64) {
    let b = Bench::new().await;
    b.proxy.torment(seed, Rates { pause: Duration::from_millis(5), ..Rates::each(0.05) });
    for _ in 0..requests {
        let mut client = b.connect().await;
        client.write_all(b"INCR n\r\n").await.unwrap();
        let _ = timeout(A_MOMENT / 4, client.read(&mut [0; 8])).await;
    }
    b.proxy.calm();
    let struck = b.proxy.struck();
    for _ in 0..20 {
        let (seen, counted, _) = b.count(None).await;
        assert!(matches!(seen, Seen::Bytes(_)) && counted, "it is calm: {seen:?}");
    }
    (struck, b.counted())
}

#[tokio::test]
async fn a_seed_decides_which_requests_are_struck_and_by_what() {
    let (one, again, other) = tokio::join!(run(1, 150), run(1, 150), run(2, 150));
    println!("{one:?}\n{other:?}");
    assert_eq!(one, again);
    assert_ne!(one, other);
    assert_eq!(one.0.len(), 8, "every fault has struck: {one:?}");
}
