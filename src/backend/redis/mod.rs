//! Locks in a Redis server.
//!
//! A driver without rules of its own: what [`protocol::Queue`](crate::protocol::Queue) decides is
//! decided here by scripts, each of them one atomic step at the server. A property test runs the
//! same random operations against both.
//!
//! # What is stored
//! All names begin with `palisade:{p}:`, where the partition `p` is a hash tag. An *id* is owner
//! and request, 48 hexadecimal digits.
//!
//! | key | type | what |
//! |---|---|---|
//! | `t` | string | token counter, and `!` and until when while there are tombstones; has no TTL |
//! | `k:<key>` | string | head: who holds the key. Where it is missing, nobody holds it or waits |
//! | `h:<key>` | hash | shared holders of several owners: owner → token and entries |
//! | `d:<key>` | sorted set | deadlines of those entries |
//! | `q:<key>` | sorted set | the line: mode and id of each waiter, by place |
//! | `w` | hash | id → record of a waiter: its keys, times, client, floor, block of tokens |
//! | `e` | sorted set | until when each waiter lives |
//! | `x:<id>` | string | tombstone of a cancelled request |
//! | `m:<id>` | string | metadata, where some was given |
//!
//! A head has one of four forms: `-x<id>:<token>` is one entry (`s` if shared, upper case with
//! metadata) whose lease is the TTL of the head; `=<owner>:<token>;x<request>:<deadline>;…` has
//! several entries of one owner, or waiters beside it; `=` alone has waiters and no holder; `#` has
//! its holders in `h` and `d`.
//!
//! # Why four forms
//! A lock that nobody else wants is one string, written by `SET NX PX` and removed by `DEL`:
//! acquire and release of any number of keys are one command each. A key with waiters must not
//! simply expire, or whoever comes next would jump the line; so it has explicit deadlines, and a
//! TTL beyond them. A thousand readers in one string would cost milliseconds for each that comes
//! and goes; in a hash and a sorted set the cost is that of one.
//!
//! # What costs what
//! On the way of a lock that nobody else wants, a call of Redis within a script costs more than all
//! of the Lua around it. So acquire has one for the clock, one that writes the counter and reads
//! what it was, and one for each key; it looks for a tombstone only where the counter is marked.
//! Release has two, whatever the number of keys. With more than sixteen operations under way, those
//! that meet nobody share a call.
//!
//! The slow way, which can do everything, takes two to three times as long as what most of those
//! need who meet at a hot key: to begin with, its functions are made anew in each run. So three
//! short ways go before it: to join a line behind one holder, to hand the key to the next in line,
//! and to renew in front of one. Each decides only what is beyond doubt, writes nothing before it
//! has, and leaves all else to the slow way.
//!
//! # Why places in line come from the token counter
//! They have to grow whatever the clock does. The counter grows.
//!
//! # What happens to the dead
//! A sole holder is gone when its head expires. Where there are waiters or readers, whoever looks
//! at a key next finds what has lapsed there, and promotes in the same step; waiters look when they
//! refresh. Waiters that stopped refreshing are found by the next script that looks at anything in
//! the partition.
//!
//! # What it relies on
//! - An owner has at most one waiting request; its clients see to that. A second one would be safe,
//!   and may be granted later than it could be.
//! - The number of partitions is compared when a connection is made. A server that was emptied
//!   under running clients takes the number of whoever connects next.
//! - A connection that replaces another one first has the old one closed by the server, so that a
//!   command in the old one's buffers is not run after its copy. Behind a unix socket, where
//!   connections cannot be told apart, such a copy may hold a released lock for one more lease.

mod failure;
mod greeting;
mod link;
mod reply;
mod request;
mod script;
mod subscribers;
mod together;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use redis::IntoConnectionInfo as _;
use tokio::task::JoinHandle;

use super::{Capabilities, LockBackend, Probe, Sink};
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{Acquire, Acquired, Inspection, Part, Released, Renewal, Renewed};
use crate::types::{ClientId, Partition, ResourceKey};

use link::Link;
use request::Share;
use script::Scripts;
use subscribers::Subscribers;

/// How [`RedisBackend`] uses its server.
///
/// ```
/// use palisade::backend::RedisOptions;
/// use std::time::Duration;
///
/// let patient = RedisOptions { reconnect_for: Duration::from_secs(3), ..RedisOptions::default() };
/// assert_eq!(patient.partitions, 1);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisOptions {
    /// How many partitions the keys are spread over: 1 unless the server belongs to a cluster. With
    /// one, any set of keys is decided in one step. The first client stores the number at the
    /// server, and clients with another number are refused.
    pub partitions: u16,
    /// How long a call bears with a server that cannot be reached, or that is in a state which may
    /// pass (loading, busy with a script, a replica), before it fails with
    /// [`Unavailable`](ErrorKind::Unavailable). A call that was sent and is not answered waits for
    /// as long as its caller does.
    pub reconnect_for: Duration,
}

impl Default for RedisOptions {
    /// One partition, and one second.
    fn default() -> Self {
        Self { partitions: 1, reconnect_for: Duration::from_secs(1) }
    }
}

/// Locks in one Redis server, version 7.0 or later.
///
/// All calls and all pushes share one connection (RESP3), which is replaced when it breaks or
/// stalls. The server should run with the policy `noeviction`: any other may drop locks when memory
/// is full.
///
/// ```no_run
/// use palisade::backend::{LockBackend, RedisBackend, RedisOptions};
///
/// # async fn example() -> palisade::Result<()> {
/// let redis = RedisBackend::connect("redis://127.0.0.1:6379", RedisOptions::default()).await?;
/// redis.ping().await?;
/// # Ok(())
/// # }
/// ```
pub struct RedisBackend {
    partitions: u16,
    link: Arc<Link>,
    subscribers: Arc<Subscribers>,
    keeper: JoinHandle<((), ())>,
}

impl RedisBackend {
    /// Connects to a server.
    ///
    /// `url` is `redis://[user:password@]host[:port][/database]`, or a socket as
    /// `redis+unix:///path?db=0&user=…&pass=…` (or `unix:`). TLS (`rediss:`) is not supported yet.
    ///
    /// # Errors
    /// - [`InvalidInput`](ErrorKind::InvalidInput): the URL or an option is wrong, before any I/O;
    ///   or the server is set up for another number of partitions.
    /// - [`Unavailable`](ErrorKind::Unavailable): the server was not reached within
    ///   [`RedisOptions::reconnect_for`].
    /// - [`Denied`](ErrorKind::Denied): the server refused the user name, the password, or a
    ///   command.
    /// - [`Corrupt`](ErrorKind::Corrupt): the number of partitions at the server is not one.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection and leaves at most the number of partitions.
    pub async fn connect(url: &str, options: RedisOptions) -> Result<Self> {
        Self::with_scripts(url, options, Scripts::default()).await
    }

    /// Connects, and from then on sends the scripts as `edit` returns them, which is shown the name
    /// and the text of each.
    #[cfg(feature = "testing")]
    pub(crate) async fn connect_edited(
        url: &str,
        options: RedisOptions,
        edit: impl FnMut(&'static str, &'static str) -> Result<&'static str>,
    ) -> Result<Self> {
        Self::with_scripts(url, options, Scripts::edited(edit)?).await
    }

    async fn with_scripts(url: &str, options: RedisOptions, scripts: Scripts) -> Result<Self> {
        let RedisOptions { partitions, reconnect_for } = options;
        if partitions == 0 || reconnect_for.is_zero() {
            return Err(invalid("at least one partition and some time to connect are needed"));
        }
        let client = client(url)?;
        let subscribers = Arc::new(Subscribers::default());
        let link = Link::new(client, partitions, reconnect_for, scripts, Arc::clone(&subscribers));
        let link = Arc::new(link);
        link.command("connect", redis::cmd("PING")).await?;
        let (kept, carried) = (Arc::clone(&link), Arc::clone(&link));
        let keeper = tokio::spawn(async move { tokio::join!(kept.keep(), carried.carry()) });
        Ok(Self { partitions, link, subscribers, keeper })
    }

    fn check(&self, operation: &'static str, partition: Partition) -> Result<()> {
        if partition.0 < self.partitions {
            return Ok(());
        }
        let detail = format!("there is no partition {partition}");
        Err(Error::new(ErrorKind::InvalidInput, operation, detail))
    }
}

impl fmt::Debug for RedisBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisBackend")
            .field("partitions", &self.partitions)
            .field("link", &self.link)
            .finish_non_exhaustive()
    }
}

impl Drop for RedisBackend {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

#[async_trait]
impl LockBackend for RedisBackend {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(self.partitions, true)
    }

    async fn subscribe(&self, client: ClientId, sink: Sink) -> Result<()> {
        let channel = self.subscribers.add(client, sink);
        let subscribed = self.link.subscribe(&channel).await;
        if subscribed.is_err() {
            self.unsubscribe(client);
        }
        subscribed
    }

    fn unsubscribe(&self, client: ClientId) {
        self.subscribers.remove(client);
        self.link.subscriber_left();
    }

    async fn acquire(&self, ask: &Acquire) -> Result<Acquired> {
        self.check("acquire", ask.part.partition)?;
        let (share, alone) = (|| Share::acquire(ask), || request::acquire(ask));
        let answer = self.link.share("acquire", share, alone).await?;
        reply::acquired(&answer.value, &ask.part)
    }

    async fn renew(&self, partition: Partition, renewals: &[Renewal]) -> Result<Vec<Renewed>> {
        self.check("renew", partition)?;
        let mut renewed = Vec::with_capacity(renewals.len());
        for (call, of) in request::renew(partition, renewals) {
            let answer = self.link.call("renew", &call).await?;
            renewed.extend(reply::renewed(&answer, of)?);
        }
        Ok(renewed)
    }

    async fn release(&self, part: &Part) -> Result<Released> {
        self.check("release", part.partition)?;
        let (share, alone) = (|| Some(Share::release(part)), || request::release(part));
        let answer = self.link.share("release", share, alone).await?;
        match reply::released(&answer.value)? {
            Released::Gone if answer.repeated => Err(failure::first_copy()),
            released => Ok(released),
        }
    }

    async fn cancel(&self, part: &Part) -> Result<()> {
        self.check("cancel", part.partition)?;
        let answer = self.link.call("cancel", &request::cancel(part)).await?;
        reply::cancelled(&answer)
    }

    async fn inspect(&self, partition: Partition, key: &ResourceKey) -> Result<Inspection> {
        self.check("inspect", partition)?;
        let answer = self.link.call("inspect", &request::inspect(partition, key)).await?;
        reply::inspection(&answer)
    }

    async fn ping(&self) -> Result<()> {
        self.link.command("ping", redis::cmd("PING")).await.map(drop)
    }

    async fn probe(&self) -> Result<Probe> {
        let answer = self.link.command("ping", redis::cmd("TIME")).await?;
        Ok(Probe::new(Some(reply::clock(&answer)?)))
    }
}

/// A client for the URL, which is not shown in an error: it may hold a password.
fn client(url: &str) -> Result<redis::Client> {
    let scheme = url.split(':').next().unwrap_or_default();
    if matches!(scheme, "rediss" | "valkeys") {
        return Err(invalid("TLS is not supported yet; use redis:// on a private network"));
    }
    let info = url.into_connection_info().map_err(|_| {
        invalid(
            "the URL is not of the form redis://[user:password@]host[:port][/database] or \
             redis+unix:///path?db=0; it is not repeated here, since it may hold a password",
        )
    })?;
    let settings = info.redis_settings().clone().set_protocol(redis::ProtocolVersion::RESP3);
    let tcp = info.tcp_settings().clone().set_nodelay(true);
    let info = info.set_redis_settings(settings).set_tcp_settings(tcp);
    redis::Client::open(info).map_err(|error| failure::explain("connect", error))
}

fn invalid(detail: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, "connect", detail)
}
