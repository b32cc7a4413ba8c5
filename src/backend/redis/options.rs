//! How the driver is told to use its server.

use std::fmt;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// How [`RedisBackend`](super::RedisBackend) uses its server.
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
    /// Whom to trust, and who to be, on a `rediss:` URL. `None` is the same as the default: the
    /// system's roots, and no certificate of one's own. Needs the feature `redis-tls`.
    pub tls: Option<TlsOptions>,
    /// How many replicas must know of a grant before it is one.
    pub min_replicas: Option<MinReplicas>,
    /// The longest lease that anybody asks for, where a server that was restarted must not grant
    /// anything before the leases that it may have forgotten have run out. `None`, the default:
    /// it grants at once, and whoever held a lock before learns at its next renewal that it is
    /// lost.
    ///
    /// Whoever connects first after a start keeps the server from granting until it has been up for
    /// this long; requests fail with [`Unavailable`](ErrorKind::Unavailable) meanwhile. So does
    /// whoever connects to a server that is new altogether. All clients of a server must agree on
    /// it.
    ///
    /// It sees restarts, and neither a `FLUSHALL` under running clients nor a failover: a replica
    /// that is promoted has mostly been up for longer than this, and grants at once. A second
    /// restart during the quiet time of a server that saves its data does not prolong that time.
    /// There, the token counter begins with the clock again, so tokens go back if the clock has.
    pub amnesia_guard: Option<Duration>,
}

impl Default for RedisOptions {
    /// One partition, one second, and no more.
    fn default() -> Self {
        Self {
            partitions: 1,
            reconnect_for: Duration::from_secs(1),
            tls: None,
            min_replicas: None,
            amnesia_guard: None,
        }
    }
}

impl RedisOptions {
    pub(super) fn check(&self) -> Result<()> {
        if self.partitions == 0 || self.reconnect_for.is_zero() {
            return Err(invalid("at least one partition and some time to connect are needed"));
        }
        let millisecond = Duration::from_millis(1);
        if self.min_replicas.is_some_and(|min| min.count == 0 || min.within < millisecond) {
            return Err(invalid("min_replicas: at least one replica and one millisecond"));
        }
        if self.amnesia_guard.is_some_and(|guard| guard < millisecond) {
            return Err(invalid("amnesia_guard: at least one millisecond"));
        }
        Ok(())
    }
}

/// How many replicas must know of a grant, and how soon.
///
/// A grant that fewer replicas have acknowledged in time is given up, and the request fails with
/// [`Unavailable`](ErrorKind::Unavailable). It costs each grant a round trip to the replicas; many
/// at once share it.
///
/// This narrows the window in which a failover loses a lock, and does not close it: a replica that
/// knows nothing of the grant may be the one that is promoted, and renewals are not waited for.
/// Replicas are asked about on a connection of its own: while a name or a proxy leads it to another
/// server than the one that granted, the answer says nothing about the grant. The stores keep a
/// stale holder out all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MinReplicas {
    /// How many replicas, at least one.
    pub count: u32,
    /// How long a grant waits for them, at least a millisecond. Where others are waiting already,
    /// it can be twice as long, and so can a renewal that shares its call with somebody who was
    /// granted: it should be well below the shortest lease.
    pub within: Duration,
}

/// Whom to trust, and who to be, on a connection by TLS. Certificates are always checked.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct TlsOptions {
    /// The certificates, PEM, that the server's must descend from. `None`: those of the system.
    pub roots: Option<Vec<u8>>,
    /// What to show to a server that wants to know its clients.
    pub client: Option<ClientCertificate>,
}

impl fmt::Debug for TlsOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsOptions")
            .field("own_roots", &self.roots.is_some())
            .field("client_certificate", &self.client.is_some())
            .finish()
    }
}

/// A certificate and its key. Neither is ever shown.
#[derive(Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// The certificate, PEM, and those between it and its root.
    pub chain: Vec<u8>,
    /// Its private key, PEM.
    pub key: Vec<u8>,
}

impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientCertificate").finish_non_exhaustive()
    }
}

/// The error of a call that can never work.
pub(super) fn invalid(detail: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, "connect", detail)
}
