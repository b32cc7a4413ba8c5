//! Requests for the tests of the Redis driver, and a client that collects what is pushed to it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use palisade::backend::{LockBackend, Push, RedisBackend, RedisOptions};
use palisade::protocol::{Acquire, Acquired, Followed, HandOver, Part, Renewal, Renewed, Standing};
use palisade::{
    ClientId, FencingToken, Lease, Mode, OwnerId, Partition, RequestId, ResourceKey, Want,
};

use crate::support::RedisServer;

/// Longer than anything takes on a busy machine.
pub const SOON: Duration = Duration::from_secs(20);

pub const P0: Partition = Partition(0);

pub fn key(text: &str) -> ResourceKey {
    ResourceKey::parse(text).unwrap()
}

pub fn lease(ms: u64) -> Lease {
    Lease::new(Duration::from_millis(ms)).unwrap()
}

/// A fresh request that waits, with a lease of a minute.
pub fn ask(client: ClientId, owner: OwnerId, keys: &[(&str, Mode)]) -> Acquire {
    let mut wants: Vec<_> = keys.iter().map(|(text, mode)| Want::new(key(text), *mode)).collect();
    wants.sort();
    Acquire {
        part: Part { partition: P0, owner, request: RequestId::next(), wants: wants.into() },
        client,
        lease: lease(60_000),
        standing: Standing::Fresh,
        wait: true,
        floor: None,
        limit: 100,
        block: 1,
        metadata: None,
    }
}

pub fn renewal(ask: &Acquire, waiting: bool) -> Renewal {
    Renewal { part: ask.part.clone(), lease: ask.lease, waiting }
}

pub async fn renew(backend: &dyn LockBackend, ask: &Acquire, waiting: bool) -> Renewed {
    backend.renew(P0, &[renewal(ask, waiting)]).await.unwrap().remove(0)
}

pub fn tokens(acquired: &Acquired) -> &[FencingToken] {
    match acquired {
        Acquired::Granted(grant) => &grant.tokens,
        other => panic!("not granted: {other:?}"),
    }
}

/// A client of a backend, and the grants that were pushed to it.
pub struct Client {
    pub id: ClientId,
    pushed: Arc<Mutex<Vec<HandOver>>>,
    followed: Arc<Mutex<Vec<Followed>>>,
}

impl Client {
    pub async fn of(backend: &dyn LockBackend) -> Self {
        Self::with_id(backend, ClientId::random()).await
    }

    pub async fn with_id(backend: &dyn LockBackend, id: ClientId) -> Self {
        let client = Self { id, ..Self::deaf() };
        client.subscribe(backend).await.unwrap();
        client
    }

    /// A client that hears nothing until it has subscribed.
    pub fn deaf() -> Self {
        Self { id: ClientId::random(), pushed: Arc::default(), followed: Arc::default() }
    }

    pub async fn subscribe(&self, backend: &dyn LockBackend) -> palisade::Result<()> {
        let (pushed, followed) = (Arc::clone(&self.pushed), Arc::clone(&self.followed));
        let sink = Arc::new(move |push| match push {
            Push::HandOver(over) => pushed.lock().unwrap().push(over),
            Push::Followed(by) => followed.lock().unwrap().push(by),
            other => panic!("{other:?}"),
        });
        backend.subscribe(self.id, sink).await
    }

    pub fn ask(&self, keys: &[(&str, Mode)]) -> Acquire {
        ask(self.id, OwnerId::new(self.id), keys)
    }

    pub fn pushed(&self) -> Vec<HandOver> {
        self.pushed.lock().unwrap().clone()
    }

    /// The requests of this client that are followed, as often as it was told so.
    pub fn followed(&self) -> Vec<Followed> {
        self.followed.lock().unwrap().clone()
    }

    pub fn was_told(&self, ask: &Acquire) -> bool {
        self.pushed().iter().any(|over| over.grant.request == ask.part.request)
    }
}

pub async fn connect(server: &RedisServer) -> RedisBackend {
    RedisBackend::connect(&server.url(), RedisOptions::default()).await.unwrap()
}

/// The names of all keys at the server but those that stay for ever.
pub fn left(server: &RedisServer) -> Vec<String> {
    let mut names: Vec<_> = server
        .command(&["KEYS", "*"])
        .lines()
        .filter(|name| !["palisade:{0}:t", "palisade:partitions"].contains(name))
        .map(str::to_owned)
        .collect();
    names.sort();
    names
}
