//! A lock service of one run, and what can happen to it.

use std::sync::Arc;
use std::time::Duration;

use palisade::backend::LockBackend;
use palisade::testing::planted_redis;
use tokio::time::timeout;

use super::Backend;
use super::bugs::Plant;
use super::memory::Network;
use crate::support::{Fault, Proxy, RedisServer};

pub enum Service {
    Redis { locks: Arc<dyn LockBackend>, proxy: Proxy, server: RedisServer },
    Memory(Arc<Network>),
}

impl Service {
    /// With the bug in it, if it is one of a lock service.
    pub async fn start(backend: Backend, plant: Plant) -> Self {
        match backend {
            Backend::RedisPostgres => {
                let server = RedisServer::start();
                let proxy = Proxy::start(server.port()).await;
                let url = format!("redis://127.0.0.1:{}", proxy.port());
                let edits = if let Plant::Scripts(edits) = plant { edits } else { &[] };
                let locks = Arc::new(planted_redis(&url, edits).await.unwrap());
                Self::Redis { locks, proxy, server }
            }
            Backend::MemorySqlite => {
                let bug = if let Plant::Memory(bug) = plant { Some(bug) } else { None };
                Self::Memory(Arc::new(Network::new(bug)))
            }
        }
    }

    pub fn locks(&self) -> Arc<dyn LockBackend> {
        match self {
            Self::Redis { locks, .. } => Arc::clone(locks),
            Self::Memory(network) => Arc::clone(network) as Arc<dyn LockBackend>,
        }
    }

    /// Forgets everything, as after a restart without persistence.
    pub fn forget(&self) {
        match self {
            Self::Redis { server, .. } => drop(server.command(&["FLUSHALL"])),
            Self::Memory(network) => network.service.forget(),
        }
    }

    /// The next acquire of `key` happens and its reply is lost, so that it is sent again.
    pub fn lose_reply(&self, key: &str) {
        match self {
            Self::Redis { proxy, .. } => proxy.plan(&format!(":k:{key}\r\n"), Fault::LoseReply),
            Self::Memory(network) => network.lose_reply(),
        }
    }

    /// Whether the planned loss has happened.
    pub async fn has_lost_reply(&self) -> bool {
        match self {
            Self::Redis { proxy, .. } => {
                timeout(Duration::from_secs(5), proxy.happened()).await.is_ok()
            }
            Self::Memory(network) => network.has_lost_reply(),
        }
    }

    /// The server refuses `command` from now on, or takes it again: a script that comes to it ends
    /// there, and what it has written before stays.
    pub fn permit(&self, command: &str, permitted: bool) {
        let Self::Redis { server, .. } = self else { panic!("memory has no commands") };
        let rule = format!("{}{command}", if permitted { '+' } else { '-' });
        server.command(&["ACL", "SETUSER", "default", &rule]);
    }
}
