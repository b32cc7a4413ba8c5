//! How operations are written for the scripts: names of keys, ids, arguments.

use std::time::Duration;

use super::script::{ACQUIRE, CANCEL, Call, INSPECT, RELEASE, RENEW};
use crate::protocol::{Acquire, Part, Renewal, Standing, TOMBSTONE};
use crate::types::{ClientId, Mode, OwnerId, Partition, RequestId, ResourceKey, Want};

/// Where the number of partitions is kept.
pub(super) const PARTITIONS: &str = "palisade:partitions";

/// The most leases that one call renews.
const RENEWALS: usize = 100;

/// The most keys that one call renews: Lua's `unpack` ends near 8000 values.
const RENEWED_KEYS: usize = 4_000;

pub(super) fn acquire(ask: &Acquire) -> Call {
    let id = id(ask.part.owner, ask.part.request);
    let prefix = prefix(ask.part.partition);
    let mut keys = vec![format!("{prefix}t"), format!("{prefix}x:{id}")];
    keys.extend(heads(&prefix, &ask.part.wants));
    let mut args = vec![
        id,
        ask.lease.as_millis().to_string(),
        modes(&ask.part.wants),
        ask.floor.map_or(0, |floor| floor.get()).to_string(),
        slow_way(ask),
    ];
    args.extend(ask.metadata.clone());
    Call::new(&ACQUIRE, keys, args)
}

/// What only an acquire that meets somebody needs, in one argument: each costs every call a little.
fn slow_way(ask: &Acquire) -> String {
    let standing = match ask.standing {
        Standing::Fresh => 'f',
        Standing::Incremental => 'i',
    };
    let wait = if ask.wait { 'w' } else { 't' };
    let (refresh, waiter, claim) = (ask.lease.refresh(), ask.lease.waiter(), ask.lease.claim());
    format!(
        "{standing}{wait}:{}:{}:{}:{}:{}",
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
        let keys = now.iter().flat_map(|renewal| heads(&prefix, &renewal.part.wants)).collect();
        let args = now.iter().flat_map(renewal_args).collect();
        calls.push((Call::new(&RENEW, keys, args), now));
        rest = later;
    }
    calls
}

fn renewal_args(renewal: &Renewal) -> [String; 5] {
    [
        id(renewal.part.owner, renewal.part.request),
        modes(&renewal.part.wants),
        renewal.part.wants.len().to_string(),
        renewal.lease.as_millis().to_string(),
        u8::from(renewal.waiting).to_string(),
    ]
}

pub(super) fn release(part: &Part) -> Call {
    let keys = heads(&prefix(part.partition), &part.wants).collect();
    Call::new(&RELEASE, keys, vec![id(part.owner, part.request), modes(&part.wants)])
}

pub(super) fn cancel(part: &Part) -> Call {
    let (id, prefix) = (id(part.owner, part.request), prefix(part.partition));
    let mut keys = vec![format!("{prefix}x:{id}")];
    keys.extend(heads(&prefix, &part.wants));
    Call::new(&CANCEL, keys, vec![id, TOMBSTONE.as_millis().to_string()])
}

pub(super) fn inspect(partition: Partition, key: &ResourceKey) -> Call {
    let prefix = prefix(partition);
    let mut keys: Vec<_> = ['k', 'q', 'h', 'd'].map(|of| format!("{prefix}{of}:{key}")).into();
    keys.extend([format!("{prefix}w"), format!("{prefix}e")]);
    Call::new(&INSPECT, keys, Vec::new())
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
fn id(owner: OwnerId, request: RequestId) -> String {
    format!("{}{request}", owner.as_uuid().simple())
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

fn heads(prefix: &str, wants: &[Want]) -> impl Iterator<Item = String> {
    wants.iter().map(move |want| format!("{prefix}k:{}", want.key))
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
        assert_eq!(parse_id(&id(owner, request)), Some((owner, request)));
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
