//! How operations are written for the scripts: names of keys, ids, arguments.

use std::fmt;
use std::time::Duration;

use super::script::{ACQUIRE, CANCEL, Call, INSPECT, RELEASE, RENEW, TOGETHER, Words};
use crate::protocol::{Acquire, Part, Renewal, Standing, TOMBSTONE};
use crate::types::{ClientId, Mode, OwnerId, Partition, RequestId, ResourceKey, Want};

/// Where the number of partitions is kept.
pub(super) const PARTITIONS: &str = "palisade:partitions";

/// The most leases that one call renews.
const RENEWALS: usize = 100;

/// The most keys that one call renews: Lua's `unpack` ends near 8000 values.
const RENEWED_KEYS: usize = 4_000;

pub(super) fn acquire(ask: &Acquire) -> Call {
    let prefix = prefix(ask.part.partition);
    let mut keys = Words::default();
    keys.push(&[&prefix, "t"]);
    push_heads(&mut keys, &prefix, &ask.part.wants);
    let mut args = Words::default();
    args.reserve(6, 160);
    args.write(id(&ask.part));
    args.write(ask.lease.as_millis());
    args.push(&[&modes(&ask.part.wants)]);
    args.write(ask.floor.map_or(0, |floor| floor.get()));
    args.push(&[&slow_way(ask)]);
    if let Some(metadata) = &ask.metadata {
        args.push(&[metadata]);
    }
    Call::new(&ACQUIRE, keys, args)
}

/// What only an acquire that meets somebody needs, in one argument: each costs every call a little.
fn slow_way(ask: &Acquire) -> String {
    let (standing, block) = match ask.standing {
        Standing::Fresh if ask.block > 1 => ('b', format!(":{}", ask.block)),
        Standing::Fresh => ('f', String::new()),
        Standing::Incremental => ('i', String::new()),
    };
    let wait = if ask.wait { 'w' } else { 't' };
    let (refresh, waiter, claim) = (ask.lease.refresh(), ask.lease.waiter(), ask.lease.claim());
    format!(
        "{standing}{wait}:{}:{}:{}:{}:{}{block}",
        ask.client,
        ask.limit,
        micros(refresh),
        micros(waiter),
        micros(claim)
    )
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
        let (mut keys, mut args) = (Words::default(), Words::default());
        for renewal in now {
            push_heads(&mut keys, &prefix, &renewal.part.wants);
            push_renewal(&mut args, renewal);
        }
        calls.push((Call::new(&RENEW, keys, args), now));
        rest = later;
    }
    calls
}

fn push_renewal(args: &mut Words, renewal: &Renewal) {
    args.write(id(&renewal.part));
    args.push(&[&modes(&renewal.part.wants)]);
    args.write(renewal.part.wants.len());
    args.write(renewal.lease.as_millis());
    args.write(u8::from(renewal.waiting));
}

pub(super) fn release(part: &Part) -> Call {
    let (mut keys, mut args) = (Words::default(), Words::default());
    push_heads(&mut keys, &prefix(part.partition), &part.wants);
    args.write(id(part));
    args.push(&[&modes(&part.wants)]);
    Call::new(&RELEASE, keys, args)
}

/// An operation as a part of a call that it shares with others.
pub(super) struct Share {
    partition: Partition,
    heads: Words,
    args: Words,
    acquires: bool,
}

impl Share {
    /// Nothing for a request with metadata or a block of tokens: the shared call has only the
    /// commonest way.
    pub(super) fn acquire(ask: &Acquire) -> Option<Self> {
        let Acquire { part, metadata, block, .. } = ask;
        let mut share = Self { acquires: true, ..Self::release(part) };
        share.args.write(ask.floor.map_or(0, |floor| floor.get()));
        share.args.write(ask.lease.as_millis());
        (metadata.is_none() && *block <= 1).then_some(share)
    }

    pub(super) fn release(part: &Part) -> Self {
        let (mut heads, mut args) = (Words::default(), Words::default());
        push_heads(&mut heads, &prefix(part.partition), &part.wants);
        args.reserve(5, 80);
        args.write(id(part));
        args.push(&[&modes(&part.wants)]);
        args.write(part.wants.len());
        Self { partition: part.partition, heads, args, acquires: false }
    }

    pub(super) fn partition(&self) -> Partition {
        self.partition
    }

    pub(super) fn keys(&self) -> usize {
        self.heads.len()
    }

    pub(super) fn acquires(&self) -> bool {
        self.acquires
    }
}

/// One call for shares of one partition, releases before acquires.
pub(super) fn together(shares: Vec<Share>) -> Call {
    let partition = shares.first().map_or(Partition(0), Share::partition);
    let releases = shares.iter().filter(|share| !share.acquires);
    let released: usize = releases.clone().map(Share::keys).sum();
    let (mut keys, mut args) = (Words::default(), Words::default());
    args.write(releases.count());
    args.write(released);
    keys.push(&[&prefix(partition), "t"]);
    for share in shares {
        keys.append(&share.heads);
        args.append(&share.args);
    }
    Call::new(&TOGETHER, keys, args)
}

pub(super) fn cancel(part: &Part) -> Call {
    let (id, prefix) = (id(part).to_string(), prefix(part.partition));
    let (mut keys, mut args) = (Words::default(), Words::default());
    keys.push(&[&prefix, "x:", &id]);
    push_heads(&mut keys, &prefix, &part.wants);
    args.push(&[&id]);
    args.write(TOMBSTONE.as_millis());
    Call::new(&CANCEL, keys, args)
}

pub(super) fn inspect(partition: Partition, key: &ResourceKey) -> Call {
    let prefix = prefix(partition);
    let mut keys = Words::default();
    for of in ["k:", "q:", "h:", "d:"] {
        keys.push(&[&prefix, of, key.as_str()]);
    }
    keys.push(&[&prefix, "w"]);
    keys.push(&[&prefix, "e"]);
    Call::new(&INSPECT, keys, Words::default())
}

/// The channel on which a client hears of its grants.
pub(super) fn channel(client: ClientId) -> String {
    format!("palisade:c:{client}")
}

/// The token counter of a partition.
pub(super) fn counter(partition: Partition) -> String {
    format!("{}t", prefix(partition))
}

/// The resource key that a Redis key is about, if it is about one.
pub(super) fn resource(redis_key: &str) -> Option<ResourceKey> {
    let (_, rest) = redis_key.strip_prefix("palisade:{")?.split_once("}:")?;
    let (kind, name) = rest.split_once(':')?;
    ["k", "q", "h", "d"].contains(&kind).then(|| ResourceKey::parse(name).ok())?
}

/// Owner and request: 48 hexadecimal digits.
fn id(part: &Part) -> impl fmt::Display {
    let (owner, request) = (part.owner.as_uuid().simple(), part.request);
    fmt::from_fn(move |f| write!(f, "{owner}{request}"))
}

/// The inverse of [`id`].
pub(super) fn parse_id(text: &str) -> Option<(OwnerId, RequestId)> {
    let (owner, request) = text.split_at_checked(32)?;
    let request = u64::from_str_radix(request, 16).ok().filter(|_| request.len() == 16)?;
    Some((owner.parse().ok()?, RequestId::from(request)))
}

fn prefix(partition: Partition) -> String {
    format!("palisade:{{{partition}}}:")
}

fn push_heads(keys: &mut Words, prefix: &str, wants: &[Want]) {
    let bytes: usize = wants.iter().map(|want| prefix.len() + 2 + want.key.as_str().len()).sum();
    keys.reserve(wants.len(), bytes);
    for want in wants {
        keys.push(&[prefix, "k:", want.key.as_str()]);
    }
}

/// `x` or `s` for all keys, or one of them for each.
fn modes(wants: &[Want]) -> String {
    let letter = |want: &Want| match want.mode {
        Mode::Exclusive => 'x',
        Mode::Shared => 's',
    };
    match wants {
        [first, rest @ ..] if rest.iter().all(|want| want.mode == first.mode) => {
            letter(first).to_string()
        }
        _ => wants.iter().map(letter).collect(),
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Lease;

    #[test]
    fn an_id_reads_as_it_was_written() {
        let owner = OwnerId::new(ClientId::random());
        let request = RequestId::next();
        let part = Part { partition: Partition(0), owner, request, wants: [].into() };
        assert_eq!(parse_id(&id(&part).to_string()), Some((owner, request)));
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
