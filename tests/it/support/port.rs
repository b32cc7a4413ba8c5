//! Free loopback ports.

use std::net::{Ipv4Addr, TcpListener};

/// A loopback port that is free now.
///
/// It lies below the range from which the system picks the ports of outgoing connections, so nobody
/// gets it by chance while its server is down; a client that connects to a dead port of that range
/// can even connect to itself. Another test may pick the same port at the same time; its server
/// then fails to start, and the caller tries another one.
pub fn free_port() -> u16 {
    (0..1000)
        .map(|_| fastrand::u16(10_000..32_000))
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .expect("a free loopback port")
}
