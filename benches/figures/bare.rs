//! The least that could lock: two short scripts, sent by redis-rs and nothing in between.

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, IntoConnectionInfo as _, ProtocolVersion, Script};

const ACQUIRE: &str = include_str!("lua/bare_acquire.lua");
const RELEASE: &str = include_str!("lua/bare_release.lua");

/// A connection with the settings of the library's own: RESP3, no delay, no time-out of its own.
pub async fn connect(url: &str) -> MultiplexedConnection {
    let info = url.into_connection_info().expect("a URL");
    let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    let tcp = info.tcp_settings().clone().set_nodelay(true);
    let info = info.set_redis_settings(settings).set_tcp_settings(tcp);
    let client = redis::Client::open(info).expect("a client");
    let config =
        AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
    client.get_multiplexed_async_connection_with_config(&config).await.expect("a connection")
}

/// What a careful user would write by hand.
#[derive(Clone)]
pub struct BareLocks {
    connection: MultiplexedConnection,
    acquire: String,
    release: String,
    lease_ms: u64,
}

/// Who holds the keys, and the token.
pub struct BareGrant {
    owner: String,
    pub token: i64,
}

impl BareLocks {
    pub async fn connect(url: &str) -> Self {
        let mut connection = connect(url).await;
        let mut hashes = Vec::new();
        for text in [ACQUIRE, RELEASE] {
            let hash = Script::new(text).load_async(&mut connection).await;
            hashes.push(hash.expect("the script is loaded"));
        }
        let [acquire, release] = hashes.try_into().expect("two scripts");
        Self { connection, acquire, release, lease_ms: 10_000 }
    }

    /// All keys or none.
    pub async fn try_acquire(&self, keys: &[String]) -> Option<BareGrant> {
        let owner = format!("{:016x}", fastrand::u64(..));
        let mut command = redis::cmd("EVALSHA");
        command.arg(&self.acquire).arg(keys.len()).arg(keys).arg(&owner).arg(self.lease_ms);
        let token = command.query_async::<Option<i64>>(&mut self.connection.clone()).await;
        token.expect("an answer").map(|token| BareGrant { owner, token })
    }

    pub async fn release(&self, keys: &[String], grant: BareGrant) {
        let mut command = redis::cmd("EVALSHA");
        command.arg(&self.release).arg(keys.len()).arg(keys).arg(&grant.owner);
        let released = command.query_async::<usize>(&mut self.connection.clone()).await;
        assert_eq!(released.expect("an answer"), keys.len(), "all keys were still held");
    }
}
