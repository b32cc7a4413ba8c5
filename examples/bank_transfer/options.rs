//! What the program can be told.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use palisade::{Fallback, LockOptions};

/// Replays a file of transfers, each as a transaction over fenced locks, and checks the balances.
#[derive(Clone, Debug, Parser)]
#[command(name = "bank_transfer")]
pub struct Options {
    /// Where the locks are: `memory:`, `redis://host:port`, or `redis:` for a server of our own.
    ///
    /// Where nothing listens at a loopback address, a server is started there. A server that was
    /// there before is used and never harmed.
    #[arg(long, value_name = "URL", default_value = "memory:")]
    pub locks: String,

    /// Where the money is: `sqlite:` for a temporary file, `sqlite:PATH`, `postgres://…`, or
    /// `postgres:` for a server of our own.
    ///
    /// The tables bank_transfer_accounts and bank_transfer_applied are dropped and made anew.
    #[arg(long, value_name = "URL", default_value = "sqlite:")]
    pub store: String,

    /// How many transfers each process runs at a time.
    #[arg(long, value_name = "N", default_value_t = 8)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub tasks: u32,

    /// How many processes share the work.
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=64))]
    pub processes: u32,

    /// Only the first N transfers of the file.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,

    /// The transfers; the opening balances are in accounts.csv beside them.
    #[arg(long, value_name = "CSV", default_value = concat!(
        env!("CARGO_MANIFEST_DIR"), "/examples/data/transfers.csv"
    ))]
    pub file: PathBuf,

    /// What a transfer does while the lock service is out of reach.
    #[arg(long, value_enum, default_value_t = Without::Fail)]
    pub fallback: Without,

    /// Kills and stops workers while they work, and Redis if it is our own (restarted empty). With
    /// a fallback, Redis stays away for half of the time.
    #[arg(long)]
    pub kill: bool,

    /// Which victims and when; printed if it is not given.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,

    /// Makes this process the worker with this number. The program starts those itself.
    #[arg(long, value_name = "N", hide = true)]
    pub worker: Option<u32>,
}

/// What there is instead of the lock service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Without {
    /// Nothing: the transfer is tried again until the service is back.
    Fail,
    /// The fence rows are the locks.
    StoreFence,
}

impl Without {
    pub fn name(self) -> &'static str {
        match self {
            Self::Fail => "fail",
            Self::StoreFence => "store-fence",
        }
    }

    pub fn fallback(self) -> Fallback {
        match self {
            Self::Fail => Fallback::Fail,
            Self::StoreFence => Fallback::StoreFence,
        }
    }
}

impl Options {
    /// Whoever has something else to turn to does not wait long for an answer.
    pub fn locking(&self) -> LockOptions {
        let mut options = LockOptions::default();
        if self.fallback != Without::Fail {
            options.call_timeout = Duration::from_millis(300);
        }
        options
    }

    /// Short where holders are killed, because others wait for as long as their leases last.
    pub fn lease(&self) -> Duration {
        if self.kill { Duration::from_secs(1) } else { Duration::from_secs(10) }
    }

    /// Whether the work is done by other processes than this one.
    pub fn has_workers(&self) -> bool {
        self.processes > 1 || self.kill
    }
}
