//! How operations are written for the scripts: names of keys, ids, arguments.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::time::Duration;

use uuid::Uuid;

use super::script::{ACQUIRE, CANCEL, Call, INSPECT, RELEASE, RENEW, TOGETHER};
use crate::protocol::{Acquire, Part, Renewal, Standing, TOMBSTONE};
use crate::types::{
    ClientId, FencingToken, Lease, Mode, OwnerId, Partition, RequestId, ResourceKey, Want,
};

/// Where the number of partitions is kept.
pub(super) const PARTITIONS: &str = "palisade:partitions";

/// The most leases that one call renews.
const RENEWALS: usize = 100;

/// The most keys that one call renews: Lua's `unpack` ends near 8000 values.
const RENEWED_KEYS: usize = 4_000;

/// What one request adds to a call, about: its id and some numbers.
const ID_BYTES: usize = 80;

pub(super) fn acquire(ask: &Acquire) -> Call {
    let Acquire { part, lease, floor, metadata, .. } = ask;
    let prefix = prefix(part.partition);
    let bytes = heads_bytes(&part.wants) + ID_BYTES + 100;
    let mut call = Call::new(&ACQUIRE, part.wants.len() + 1, 6, bytes);
    call.key(&[&prefix, "t"]);
    push_heads(&mut call, &prefix, &part.wants);
    call.arg(id(part).as_str());
    call.arg(lease.as_millis());
    call.arg(&*modes(&part.wants));
    call.arg(floor.map_or(0, FencingToken::get));
    call.arg(slow_way(ask));
    if let Some(metadata) = metadata {
        call.arg(metadata);
    }
    call
}

/// What only an acquire that meets somebody needs, in one argument: each costs every call a little.
fn slow_way(ask: &Acquire) -> String {
    let Acquire { standing, block, lease, client, limit, .. } = *ask;
    let (standing, block) = match standing {
        Standing::Fresh if block > 1 => ('b', Some(block)),
        Standing::Fresh => ('f', None),
        Standing::Incremental => ('i', None),
    };
    let wait = if ask.wait { 'w' } else { 't' };
    let (refresh, waiter, claim) = (lease.refresh(), lease.waiter(), lease.claim());
    let (refresh, waiter, claim) = (micros(refresh), micros(waiter), micros(claim));
    let mut text = String::with_capacity(80);
    // A string takes everything.
    let _ = write!(text, "{standing}{wait}:{client}:{limit}:{refresh}:{waiter}:{claim}");
    if let Some(block) = block {
        let _ = write!(text, ":{block}");
    }
    text
}

/// The calls that renew `renewals`, in order.
pub(super) fn renew(partition: Partition, renewals: &[Renewal]) -> Vec<(Call, &[Renewal])> {
    let prefix = prefix(partition);
    let mut calls = Vec::new();
    let mut rest = renewals;
    while !rest.is_empty() {
        let mut keys = 0;
        let fit = rest.iter().take(RENEWALS).take_while(|renewal| {
            keys += renewal.part.wants.len();
            keys <= RENEWED_KEYS
        });
        // One request has fewer keys than the limit, so at least one fits.
        let (now, later) = rest.split_at(fit.count().max(1).min(rest.len()));
        let heads: usize = now.iter().map(|renewal| renewal.part.wants.len()).sum();
        let bytes = now.iter().map(|renewal| heads_bytes(&renewal.part.wants) + ID_BYTES).sum();
        let mut call = Call::new(&RENEW, heads, 5 * now.len(), bytes);
        now.iter().for_each(|renewal| push_heads(&mut call, &prefix, &renewal.part.wants));
        now.iter().for_each(|renewal| push_renewal(&mut call, renewal));
        calls.push((call, now));
        rest = later;
    }
    calls
}

fn push_renewal(call: &mut Call, renewal: &Renewal) {
    push_part(call, &renewal.part);
    call.arg(renewal.lease.as_millis());
    call.arg(u8::from(renewal.waiting));
}

fn push_part(call: &mut Call, part: &Part) {
    call.arg(id(part).as_str());
    call.arg(&*modes(&part.wants));
    call.arg(part.wants.len());
}

pub(super) fn release(part: &Part) -> Call {
    let bytes = heads_bytes(&part.wants) + ID_BYTES;
    let mut call = Call::new(&RELEASE, part.wants.len(), 2, bytes);
    push_heads(&mut call, &prefix(part.partition), &part.wants);
    call.arg(id(part).as_str());
    call.arg(&*modes(&part.wants));
    call
}

/// An operation as a part of a call that it shares with others.
pub(super) struct Share {
    part: Part,
    /// The floor and the lease of an acquire.
    grant: Option<(Option<FencingToken>, Lease)>,
}

impl Share {
    /// Nothing for a request with metadata or a block of tokens: the shared call has only the
    /// commonest way.
    pub(super) fn acquire(ask: &Acquire) -> Option<Self> {
        let Acquire { part, metadata, block, floor, lease, .. } = ask;
        let grant = Some((*floor, *lease));
        (metadata.is_none() && *block <= 1).then(|| Self { part: part.clone(), grant })
    }

    pub(super) fn release(part: &Part) -> Self {
        Self { part: part.clone(), grant: None }
    }

    pub(super) fn partition(&self) -> Partition {
        self.part.partition
    }

    pub(super) fn keys(&self) -> usize {
        self.part.wants.len()
    }

    pub(super) fn acquires(&self) -> bool {
        self.grant.is_some()
    }
}

/// One call for shares of one partition, releases before acquires.
pub(super) fn together(shares: &[Share]) -> Call {
    let prefix = prefix(shares.first().map_or(Partition(0), Share::partition));
    let releases = shares.iter().filter(|share| !share.acquires());
    let released: usize = releases.clone().map(Share::keys).sum();
    let keys: usize = shares.iter().map(Share::keys).sum();
    let bytes: usize = shares.iter().map(|share| heads_bytes(&share.part.wants) + ID_BYTES).sum();
    let mut call = Call::new(&TOGETHER, keys + 1, 5 * shares.len() + 2, bytes + 40);
    call.key(&[&prefix, "t"]);
    shares.iter().for_each(|share| push_heads(&mut call, &prefix, &share.part.wants));
    call.arg(releases.count());
    call.arg(released);
    for Share { part, grant } in shares {
        push_part(&mut call, part);
        if let Some((floor, lease)) = grant {
            call.arg(floor.map_or(0, FencingToken::get));
            call.arg(lease.as_millis());
        }
    }
    call
}

pub(super) fn cancel(part: &Part) -> Call {
    let (id, prefix) = (id(part), prefix(part.partition));
    let bytes = heads_bytes(&part.wants) + 2 * ID_BYTES;
    let mut call = Call::new(&CANCEL, part.wants.len() + 1, 2, bytes);
    call.key(&[&prefix, "x:", id.as_str()]);
    push_heads(&mut call, &prefix, &part.wants);
    call.arg(id.as_str());
    call.arg(micros(TOMBSTONE) / 1_000);
    call
}

pub(super) fn inspect(partition: Partition, key: &ResourceKey) -> Call {
    let prefix = prefix(partition);
    let mut call = Call::new(&INSPECT, 6, 0, 0);
    for of in ["k:", "q:", "h:", "d:"] {
        call.key(&[&prefix, of, key.as_str()]);
    }
    call.key(&[&prefix, "w"]);
    call.key(&[&prefix, "e"]);
    call
}

/// The channel on which a client hears of its grants.
pub(super) fn channel(client: ClientId) -> String {
    format!("palisade:c:{client}")
}

/// The resource key that a Redis key is about, if it is about one.
pub(super) fn resource(redis_key: &str) -> Option<ResourceKey> {
    let (_, rest) = redis_key.strip_prefix("palisade:{")?.split_once("}:")?;
    let (kind, name) = rest.split_once(':')?;
    ["k", "q", "h", "d"].contains(&kind).then(|| ResourceKey::parse(name).ok())?
}

/// Owner and request: 48 hexadecimal digits.
fn id(part: &Part) -> Id {
    let mut digits = [0; 64];
    let (owner, request) = digits.split_at_mut(32);
    part.owner.as_uuid().simple().encode_lower(owner);
    // A UUID is quicker to write than a number; the request is the first half of one.
    Uuid::from_u64_pair(part.request.as_u64(), 0).simple().encode_lower(request);
    Id(digits)
}

struct Id([u8; 64]);

impl Id {
    fn as_str(&self) -> &str {
        let digits = self.0.get(..48).unwrap_or_default();
        std::str::from_utf8(digits).unwrap_or_default()
    }
}

/// The inverse of [`id`].
pub(super) fn parse_id(text: &str) -> Option<(OwnerId, RequestId)> {
    let (owner, request) = text.split_at_checked(32)?;
    let request = u64::from_str_radix(request, 16).ok().filter(|_| request.len() == 16)?;
    Some((owner.parse().ok()?, RequestId::from(request)))
}

fn prefix(partition: Partition) -> Cow<'static, str> {
    match partition {
        // A single server has no other.
        Partition(0) => Cow::Borrowed("palisade:{0}:"),
        partition => Cow::Owned(format!("palisade:{{{partition}}}:")),
    }
}

/// The longest lease has far fewer than can be counted.
fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn push_heads(call: &mut Call, prefix: &str, wants: &[Want]) {
    for want in wants {
        call.key(&[prefix, "k:", want.key.as_str()]);
    }
}

/// How long the names of the heads are, together.
fn heads_bytes(wants: &[Want]) -> usize {
    const PREFIX: usize = "palisade:{65535}:k:".len();
    wants.iter().map(|want| PREFIX + want.key.as_str().len()).sum()
}

/// `x` or `s` for all keys, or one of them for each.
fn modes(wants: &[Want]) -> Cow<'static, str> {
    let letter = |want: &Want| match want.mode {
        Mode::Exclusive => "x",
        Mode::Shared => "s",
    };
    match wants {
        [first, rest @ ..] if rest.iter().all(|want| want.mode == first.mode) => {
            Cow::Borrowed(letter(first))
        }
        _ => wants.iter().map(letter).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_as_it_was_written() {
        let owner = OwnerId::new(ClientId::random());
        let request = RequestId::next();
        let part = Part { partition: Partition(0), owner, request, wants: [].into() };
        assert_eq!(parse_id(id(&part).as_str()), Some((owner, request)));
        for bad in ["", "12", &"g".repeat(48), &"0".repeat(47), &"0".repeat(49)] {
            assert_eq!(parse_id(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_resource_is_read_from_any_of_its_keys() {
        for name in ["a", "a}:b{", "k:x", "{0}:"] {
            let key = ResourceKey::parse(name).unwrap();
            assert_eq!(resource(&format!("{}q:{name}", prefix(Partition(7)))), Some(key));
        }
        assert_eq!(resource("palisade:{0}:t"), None);
        assert_eq!(resource("palisade:{0}:m:00"), None);
    }

    #[test]
    fn renewals_are_sent_in_calls_of_bounded_size() {
        let part = |keys: usize| Part {
            partition: Partition(0),
            owner: OwnerId::new(ClientId::random()),
            request: RequestId::next(),
            wants: (0..keys)
                .map(|n| Want::new(ResourceKey::parse(n.to_string()).unwrap(), Mode::Shared))
                .collect(),
        };
        let lease = Lease::new(Duration::from_secs(1)).unwrap();
        let renewals = |n: usize, keys: usize| -> Vec<Renewal> {
            (0..n).map(|_| Renewal { part: part(keys), lease, waiting: false }).collect()
        };
        let sizes = |renewals: &[Renewal]| -> Vec<usize> {
            renew(Partition(0), renewals).iter().map(|(_, of)| of.len()).collect()
        };
        assert_eq!(sizes(&renewals(250, 1)), [100, 100, 50]);
        assert_eq!(sizes(&renewals(9, 1000)), [4, 4, 1]);
        assert_eq!(sizes(&[]), [0; 0]);
    }
}
