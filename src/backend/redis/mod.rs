//! Locks in a Redis server.
//!
//! A driver without rules of its own: what [`protocol::Queue`](crate::protocol::Queue) decides is
//! decided here by scripts, each of them one atomic step at the server. A property test runs the
//! same random operations against both.
//!
//! # What is stored
//! All names begin with `palisade:{p}:`, where the partition `p` is a hash tag. An *id* is owner
//! and request, 48 hexadecimal digits. Beside them: `palisade:partitions`, how many there are;
//! `palisade:life`, the run of the server that was seen last, where there is a guard against
//! forgotten locks; `palisade:replicated`, what is written to see replicas follow.
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
//! While nothing is to be granted, `t` is the word `quiet` and has a TTL: no script takes that for
//! a counter, and none changes it.
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

mod condition;
mod failure;
mod greeting;
mod link;
mod options;
mod pace;
mod replicas;
mod reply;
mod request;
mod script;
mod server;
mod subscribers;
#[cfg(feature = "redis-tls")]
mod tls;
#[cfg(not(feature = "redis-tls"))]
#[path = "no_tls.rs"]
mod tls;
mod together;

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use tokio_util::task::AbortOnDropHandle;

use super::{Capabilities, LockBackend, Probe, Sink};
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{Acquire, Acquired, Inspection, Part, Released, Renewal, Renewed};
use crate::types::{ClientId, Partition, ResourceKey};

use link::Link;
use replicas::Replicas;
use request::Share;
use script::Scripts;
use server::Server;
use subscribers::Subscribers;

pub use options::{ClientCertificate, MinReplicas, RedisOptions, TlsOptions};

/// Locks in one Redis server, version 7.0 or later.
///
/// All calls and all pushes share one connection (RESP3), which is replaced when it breaks or
/// stalls. The server should run with the policy `noeviction`: any other may drop locks when memory
/// is full, and is warned of where it is seen.
///
/// # What its user must be allowed
///
/// ```text
/// ACL SETUSER locks on >password ~palisade:* &palisade:c:*
///     +@read +@write +@scripting +@pubsub +@connection -@dangerous +time +info +client|kill
/// ```
///
/// Without `+info` it works too, and is told neither of an old version nor of the policy; without
/// `+client|kill`, a command in the buffers of a lost connection may still run later.
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
    replicas: Option<Arc<Replicas>>,
    subscribers: Arc<Subscribers>,
    _keeper: AbortOnDropHandle<()>,
}

impl RedisBackend {
    /// Connects to a server.
    ///
    /// `url` is `redis://[user:password@]host[:port][/database]`, the same with `rediss:` for TLS
    /// (feature `redis-tls`), or a socket as `redis+unix:///path?db=0&user=…&pass=…` (or `unix:`).
    /// What is special in a URL has to be percent-encoded in a password.
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
        options.check()?;
        let RedisOptions { partitions, reconnect_for, min_replicas, .. } = options;
        let server = Arc::new(Server::parse(url, options.tls.as_ref())?);
        let replicas = min_replicas
            .map(|min| Arc::new(Replicas::new(Arc::clone(&server), min, reconnect_for)));
        let subscribers = Arc::new(Subscribers::default());
        let link = Arc::new(Link::new(server, options, scripts, Arc::clone(&subscribers)));
        let keeper = tokio::spawn(keep(Arc::clone(&link), replicas.clone()));
        let keeper = AbortOnDropHandle::new(keeper);
        link.command("connect", redis::cmd("PING")).await?;
        Ok(Self { partitions, link, replicas, subscribers, _keeper: keeper })
    }

    fn check(&self, operation: &'static str, partition: Partition) -> Result<()> {
        if partition.0 < self.partitions {
            return Ok(());
        }
        let detail = format!("there is no partition {partition}");
        Err(Error::new(ErrorKind::InvalidInput, operation, detail))
    }

    /// What was granted, enough replicas know of; or it is given up.
    async fn known(&self, operation: &'static str, granted: &Part) -> Result<()> {
        let Some(replicas) = &self.replicas else { return Ok(()) };
        let known = replicas.know(operation).await;
        if known.is_err() {
            // What cannot be released now is settled by whoever asked, or expires.
            let _ = self.release(granted).await;
        }
        known
    }

    /// Those who stood in line are told that they have lost what too few replicas know of. It is
    /// not given up here: a push may have told them of the grant in time, and then they work under
    /// it. Whoever was not told cancels what it hears is lost.
    async fn hide_unknown(&self, renewals: &[Renewal], renewed: &mut [Renewed]) {
        let Some(replicas) = &self.replicas else { return };
        let mut answers: Vec<_> = renewals.iter().zip(renewed).collect();
        answers.retain(|(of, to)| of.waiting && matches!(to, Renewed::Held(Some(_))));
        if !answers.is_empty() && replicas.know("renew").await.is_err() {
            answers.into_iter().for_each(|(_, answer)| *answer = Renewed::Lost);
        }
    }

    /// Names the reason where the token counter is none because the server keeps quiet.
    async fn unless_quiet<T>(&self, part: &Part, answer: Result<T>) -> Result<T> {
        match answer {
            Err(error) if error.kind() == ErrorKind::Corrupt && error.key().is_none() => {
                let operation = error.operation();
                let left = self.link.quiet_for(part.partition).await;
                Err(left.map_or(error, |left| condition::quiet(operation, left)))
            }
            answer => answer,
        }
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

#[async_trait]
impl LockBackend for RedisBackend {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(self.partitions, true)
    }

    async fn subscribe(&self, client: ClientId, sink: Sink) -> Result<()> {
        let sink = match &self.replicas {
            Some(replicas) => Arc::clone(replicas).hold_back(sink),
            None => sink,
        };
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
        let acquired = reply::acquired(&answer.value, &ask.part);
        let acquired = match self.unless_quiet(&ask.part, acquired).await {
            // What kept the server quiet may have expired meanwhile.
            Err(error) if error.kind() == ErrorKind::Corrupt && error.key().is_none() => {
                let answer = self.link.call("acquire", &request::acquire(ask)).await?;
                reply::acquired(&answer, &ask.part)?
            }
            acquired => acquired?,
        };
        if matches!(acquired, Acquired::Granted(_)) {
            self.known("acquire", &ask.part).await?;
        }
        Ok(acquired)
    }

    async fn renew(&self, partition: Partition, renewals: &[Renewal]) -> Result<Vec<Renewed>> {
        self.check("renew", partition)?;
        let mut renewed = Vec::with_capacity(renewals.len());
        for (call, of) in request::renew(partition, renewals) {
            let answer = self.link.call("renew", &call).await?;
            renewed.extend(reply::renewed(&answer, of)?);
        }
        self.hide_unknown(renewals, &mut renewed).await;
        Ok(renewed)
    }

    async fn release(&self, part: &Part) -> Result<Released> {
        self.check("release", part.partition)?;
        let (share, alone) = (|| Some(Share::release(part)), || request::release(part));
        let answer = self.link.share("release", share, alone).await?;
        let released = reply::released(&answer.value);
        match self.unless_quiet(part, released).await? {
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

/// What goes on beside all calls. Runs until it is dropped.
async fn keep(link: Arc<Link>, replicas: Option<Arc<Replicas>>) {
    let follow = async {
        if let Some(replicas) = replicas {
            tokio::join!(replicas.ask(), replicas.pass_on());
        }
    };
    tokio::join!(Arc::clone(&link).keep(), link.carry(), follow);
}
