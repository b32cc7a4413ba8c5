//! What a run plays on: servers of its own, a directory, a seed, a time.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use tempfile::TempDir;

use crate::Result;
use crate::support::{PostgresServer, RedisServer};

/// Where locks and data are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// Redis and PostgreSQL.
    Redis,
    /// Locks in memory, data in SQLite.
    Memory,
}

impl Backend {
    pub const ALL: [Self; 2] = [Self::Redis, Self::Memory];

    pub fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Memory => "memory",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The stage of one run. The servers end with it; the directory stays if it is told to.
#[derive(Debug)]
pub struct Stage {
    pub backend: Backend,
    pub seed: u64,
    pub time: Duration,
    /// Only the control is run.
    pub control: bool,
    directory: TempDir,
    redis: Option<RedisServer>,
    postgres: Option<PostgresServer>,
}

impl Stage {
    pub fn new(backend: Backend, seed: u64, time: Duration, control: bool) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("palisade-torture-").tempdir()?;
        Ok(Self { backend, seed, time, control, directory, redis: None, postgres: None })
    }

    /// Starts the Redis of a run on that back end.
    pub fn with_redis(mut self) -> Self {
        self.redis = (self.backend == Backend::Redis).then(RedisServer::start);
        self
    }

    /// Starts the PostgreSQL of a run on that back end.
    pub fn with_postgres(mut self) -> Self {
        self.postgres = (self.backend == Backend::Redis).then(PostgresServer::start);
        self
    }

    pub fn redis(&self) -> Option<&RedisServer> {
        self.redis.as_ref()
    }

    /// The URL of the lock service.
    pub fn locks(&self) -> String {
        self.redis.as_ref().map_or("memory:".to_owned(), RedisServer::url)
    }

    /// The URL of the store.
    pub fn store(&self) -> String {
        let file = || format!("sqlite:{}", self.directory().join("store.db").display());
        self.postgres.as_ref().map_or_else(file, PostgresServer::url)
    }

    /// Where histories go.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A generator of its own for each part of the run.
    pub fn random(&self, part: u64) -> fastrand::Rng {
        fastrand::Rng::with_seed(self.seed ^ (part << 32))
    }

    /// The run is worth looking at: its directory stays.
    pub fn keep(self) -> PathBuf {
        self.directory.keep()
    }
}
