//! A process with many requests for one key, of which the tests run two: they see who is served
//! when, and stop and kill one of them.
//!
//! `crowd LOCKS_URL LEASE_MS KEY` reads `pass NAME` (take the key, say so, give it up), `keep NAME`
//! (keep it until told otherwise) and `release`. It prints `asked NAME` when a request has its
//! place within the process, `held NAME TOKEN` when it is granted, and for `release` what came of
//! it.

use std::io::{BufRead, Write};
use std::time::Duration;

use palisade::{Error, LockGuard, Locks};
use tokio::sync::mpsc::unbounded_channel;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, lease, key] = arguments.as_slice() else { panic!("three arguments, please") };
    let lease = Duration::from_millis(lease.parse().expect("milliseconds"));
    let locks = palisade::connect(url).await?;
    let (lines, mut orders) = unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            lines.send(line.expect("text")).expect("somebody reads");
        }
    });
    let (keeps, mut kept) = unbounded_channel();
    let mut asked = 0;
    while let Some(order) = orders.recv().await {
        let Some((what, name)) = order.split_once(' ') else {
            let guard: LockGuard = kept.recv().await.expect("one is kept");
            match guard.release().await {
                Ok(()) => say("released"),
                Err(error) => say(&format!("{:?}", error.kind())),
            }
            continue;
        };
        // What was pushed to this process before the order came is here before the answer.
        locks.inspect(key).await?;
        let request = locks.lock(key).ttl(lease).wait(Duration::from_secs(120));
        let keeps = (what == "keep").then(|| keeps.clone());
        let name = name.to_owned();
        asked += 1;
        let told = name.clone();
        tokio::spawn(async move {
            let guard = request.acquire().await.expect("a grant");
            say(&format!("held {name} {}", guard.token()));
            match keeps {
                Some(keeps) => keeps.send(guard).expect("somebody keeps it"),
                None => drop(guard.release().await),
            }
        });
        while !has_a_place(&locks, asked) {
            tokio::task::yield_now().await;
        }
        say(&format!("asked {told}"));
    }
    Ok(())
}

/// Whether all requests so far wait, or have waited.
fn has_a_place(locks: &Locks, asked: u64) -> bool {
    let statistics = locks.statistics();
    statistics.waiting + statistics.acquired >= asked
}

fn say(words: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{words}").and_then(|()| out.flush()).expect("somebody listens");
}
