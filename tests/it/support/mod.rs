//! Real servers for tests, started by the test that needs them and stopped with it.
//!
//! Each server has a loopback port and a directory of its own, so tests may run side by side. A
//! server that is not installed fails the test; nothing is skipped.
//!
//! # Why a server never outlives its test
//! A dropped handle stops its server. A test process that is killed drops nothing, so the kernel is
//! asked to signal the server when its parent dies. It means the parent *thread*; that is why
//! servers are forked by one thread which lives as long as the process, and may be started from any
//! thread or task.

mod certificates;
mod clock;
mod cuttable;
mod directory;
mod events;
mod port;
mod postgres;
mod process;
mod proxy;
mod redis;

use std::path::PathBuf;
use std::time::Duration;

use tokio::time::{Instant, sleep};

pub use certificates::Certificates;
pub use clock::ServerClock;
pub use cuttable::Cuttable;
pub use directory::Directory;
pub use events::Events;
pub use postgres::PostgresServer;
pub use process::{children, is_alive};
pub use proxy::{Fault, Harm, Point, Proxy, Rates, Side};
pub use redis::{NEXT_PORT, RedisServer};

/// Where cargo puts the example `name`, seen from a test.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().join("examples").join(name)
}

/// Waits until `condition` holds, asking every few milliseconds.
///
/// The clock is tokio's, so it also works where that is paused.
///
/// # Panics
/// When the condition does not hold `within` the time; `what` completes "waited in vain until".
pub async fn wait_until(what: &str, within: Duration, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !condition().await {
        assert!(Instant::now() < deadline, "waited in vain until {what}, for {within:?}");
        sleep(Duration::from_millis(5)).await;
    }
}
