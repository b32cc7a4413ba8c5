//! Moves money between accounts, from several tasks and processes at once, while things go wrong;
//! and checks that every transfer was applied exactly once.
//!
//! ```sh
//! cargo run --release --example bank_transfer
//! cargo run --release --example bank_transfer -- --processes 4
//! cargo run --release --example bank_transfer -- \
//!     --locks redis: --store postgres: --processes 4 --kill
//! cargo run --release --example bank_transfer -- \
//!     --locks redis: --store postgres: --processes 4 --kill --fallback store-fence
//! ```
//!
//! The first needs nothing installed: the locks are in memory, the money is in a temporary SQLite
//! file, and each commit is forced to its disk. The second shows processes that have nothing in
//! common but that file: the fence alone keeps them apart. The third starts a Redis and a
//! PostgreSQL of its own; with URLs it uses yours. In the last, Redis is away for half of the time,
//! and the work goes on without it.
//!
//! `bank.rs` holds the transaction, `worker.rs` what is done about its errors; the rest is about
//! watching, killing, and checking.

mod bank;
mod chaos;
mod crew;
mod input;
mod options;
mod report;
mod servers;
mod worker;

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use bank::Bank;
use chaos::Chaos;
use crew::Crew;
use input::{Books, Input};
use options::{Options, Without};
use report::Summary;
use servers::Servers;

type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    let answer = match options.worker {
        Some(number) => worker::child(&options, number).await.map(|()| true),
        None => conduct(options).await,
    };
    match answer {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprint!("error: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::from(2)
        }
    }
}

/// Runs all transfers. Whether the balances are right is the answer.
async fn conduct(mut options: Options) -> Result<bool> {
    let input = Input::read(&options.file, options.limit)?;
    let expected = input.replay();
    let mut servers = Servers::prepare(&options)?;
    (options.locks, options.store) = (servers.locks.clone(), servers.store.clone());
    let bank = Bank::open(&options.store, 1).await?;
    bank.create(&input.opening).await?;
    announce(&options, &input, &servers);

    let started = Instant::now();
    let mut summary = Summary::default();
    let crew = Crew::start(&options, &input.transfers)?;
    let watched = watch(crew, &options, &mut servers, &mut summary, input.transfers.len());
    let killed = tokio::select! {
        watched = watched => watched?,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            return Err("interrupted".into());
        }
    };
    print!("{}", summary.table(&input.transfers, started.elapsed()));
    if let Some(killed) = killed {
        println!("on purpose         {killed}");
    }
    let books = bank.books().await?;
    compare(&expected, &books);
    let equal = expected == books;
    println!("balances equal the replay: {}", if equal { "yes" } else { "NO" });
    Ok(equal)
}

fn announce(options: &Options, input: &Input, servers: &Servers) {
    let Options { locks, store, tasks, processes, .. } = options;
    println!("{} transfers, {processes} processes of {tasks} tasks", input.transfers.len());
    let (locks, store, lease) = (shown(locks), shown(store), options.lease());
    println!("locks {locks}, money {store}, leases of {lease:?}");
    if options.kill && servers.redis.is_none() {
        println!("only workers will be killed: the lock service was not started by this program");
    }
}

/// The URL without user name and password.
fn shown(url: &str) -> String {
    match (url.split_once("//"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, place))) => format!("{scheme}//{place}"),
        _ => url.to_owned(),
    }
}

/// Shows how far the workers are until all have finished; meanwhile things go wrong if wanted.
async fn watch(
    mut crew: Crew,
    options: &Options,
    servers: &mut Servers,
    summary: &mut Summary,
    transfers: usize,
) -> Result<Option<chaos::Counts>> {
    let bar = ProgressBar::new(transfers as u64);
    bar.set_style(ProgressStyle::with_template(
        "{wide_bar} {pos}/{len} transfers, {per_sec}, {eta} to go",
    )?);
    let mut done = vec![0; options.processes as usize];
    let mut chaos = options.kill.then(|| {
        let seed = options.seed.unwrap_or_else(|| fastrand::u64(..));
        println!("seed {seed}");
        let outages = servers.redis.is_some() && options.fallback != Without::Fail;
        Chaos::new(seed, options.lease(), outages)
    });
    loop {
        let strike = async {
            match &chaos {
                Some(chaos) => chaos.wait().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            next = crew.next() => {
                let Some((number, report)) = next? else { break };
                done[number] = report.done;
                bar.set_position(done.iter().sum::<usize>() as u64);
                summary.add(report);
            }
            () = strike => {
                if let Some(chaos) = &mut chaos {
                    chaos.act(&mut crew, servers.redis.as_mut())?;
                }
            }
        }
    }
    bar.finish_and_clear();
    Ok(chaos.map(|chaos| chaos.counts()))
}

/// Says where the books differ.
fn compare(expected: &Books, found: &Books) {
    let Books { applied, refused, .. } = found;
    println!("applied            {applied}, of which {refused} were refused for lack of funds");
    if (expected.applied, expected.refused) != (*applied, *refused) {
        println!("  the replay: {}, of which {} refused", expected.applied, expected.refused);
    }
    let differing =
        expected.balances.iter().filter(|(name, cents)| found.balances.get(*name) != Some(*cents));
    for (name, cents) in differing.take(10) {
        println!("  {name}: {:?} instead of {cents}", found.balances.get(name));
    }
}
