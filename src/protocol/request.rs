//! What a client asks of a lock service, and what the service may answer.
//!
//! Each of the five operations is one atomic step within one partition, and each is safe to send
//! twice: requests are known by `(owner, request)`.

use std::sync::Arc;
use std::time::Duration;

use crate::types::{
    ClientId, FencingToken, Lease, Mode, OwnerId, Partition, RequestId, ResourceKey, Want,
};

use super::Standing;

/// What names a request and the keys it is about, within one partition.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Part {
    /// Where all of `wants` live.
    pub partition: Partition,
    /// Who asks.
    pub owner: OwnerId,
    /// Which of the owner's calls this is.
    pub request: RequestId,
    /// The keys and modes, sorted by key, each key once.
    pub wants: Arc<[Want]>,
}

/// A request for all keys of `part`, or for none of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acquire {
    /// Who asks for what.
    pub part: Part,
    /// Where a grant that was waited for is pushed to.
    pub client: ClientId,
    /// How long a grant lasts; refresh and claim times follow from it.
    pub lease: Lease,
    /// What the client's own books say about the owner in this partition.
    pub standing: Standing,
    /// Whether the request may stand in line; otherwise it is tried.
    pub wait: bool,
    /// Tokens must exceed this one.
    pub floor: Option<FencingToken>,
    /// The most entries that the owner may have on one key.
    pub limit: u32,
    /// How many tokens a grant reserves: 1 unless the client passes the grant on among its own
    /// waiters, who need one each. Only a fresh request gets more than one.
    pub block: u32,
    /// Free text that [`Inspection`] shows to operators.
    pub metadata: Option<String>,
}

/// The answer to [`Acquire`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Acquired {
    /// All keys are held.
    Granted(Grant),
    /// The request stands in line on all keys.
    Queued {
        /// How many requests are before it on its most crowded key.
        position: u32,
        /// When to refresh: at the latest after one refresh interval, earlier when a lease that is
        /// in the way may lapse sooner.
        ask_again_in: Duration,
    },
    /// Refused, and nothing is left behind.
    Busy {
        /// The key that is in the way.
        key: ResourceKey,
        /// Who holds it, if it is held.
        holders: Vec<OwnerId>,
        /// Whether requests stand in line for it.
        waiters: bool,
    },
    /// The owner holds this key shared and asked for it exclusively.
    Upgrade {
        /// Which key.
        key: ResourceKey,
    },
    /// The owner has `limit` entries on this key already.
    LimitReached {
        /// Which key.
        key: ResourceKey,
    },
    /// This request was cancelled before; a late copy of it is never granted.
    Cancelled,
}

/// All keys of a request, held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Which request was granted.
    pub request: RequestId,
    /// One token per key, in the order of the request's wants. A key that the owner held before
    /// keeps its token.
    pub tokens: Vec<FencingToken>,
    /// How many tokens, from the one in `tokens` on, nobody else is ever given. Only the call that
    /// makes the grant says so, in its answer and its push; a later one says 1, because services do
    /// not remember it.
    pub block: u32,
}

/// Keep this request alive, be it held or queued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewal {
    /// Which request, with its keys.
    pub part: Part,
    /// The new lease, from now.
    pub lease: Lease,
    /// Whether the client still waits for this request as far as it knows.
    pub waiting: bool,
}

/// The answer to one [`Renewal`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Renewed {
    /// All keys are held for another lease. Tokens are told to whoever thought it was waiting.
    Held(Option<Grant>),
    /// The request still stands in line.
    Queued {
        /// As in [`Acquired::Queued`].
        ask_again_in: Duration,
    },
    /// At least one key is no longer held, or the request is unknown. What was left of it is gone.
    Lost,
}

/// The answer to a release.
// exhaustive: an entry is there or it is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// The request held its keys until now.
    Released,
    /// The request held none of its keys any more, or not all: it had lapsed, the service had lost
    /// its memory, or an earlier call released it.
    Gone,
}

/// What a service knows about one key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inspection {
    /// Who holds it, the oldest entry first.
    pub holders: Vec<Holder>,
    /// Who stands in line, in the order of the line.
    pub waiters: Vec<Waiter>,
}

/// One entry of a holder. An owner that entered a key three times has three.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Who.
    pub owner: OwnerId,
    /// By which request.
    pub request: RequestId,
    /// How.
    pub mode: Mode,
    /// With which token.
    pub token: FencingToken,
    /// Since when, as far as the token tells: it is the service's clock at the first grant, unless
    /// a floor or a clock step raised it; then the age is understated.
    pub held_for: Duration,
    /// When the entry lapses unless it is renewed.
    pub expires_in: Duration,
    /// The text that came with the request.
    pub metadata: Option<String>,
}

/// One request that stands in line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiter {
    /// Who.
    pub owner: OwnerId,
    /// By which request.
    pub request: RequestId,
    /// How it wants the key.
    pub mode: Mode,
    /// Since when.
    pub waiting_for: Duration,
    /// When it is dropped from the line unless it refreshes.
    pub expires_in: Duration,
    /// The text that came with the request.
    pub metadata: Option<String>,
}
