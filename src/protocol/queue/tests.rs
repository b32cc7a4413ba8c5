use super::*;
use crate::types::Partition;

const START: u64 = 1_000_000;

fn token(number: u64) -> FencingToken {
    FencingToken::new(number).unwrap()
}

struct Bench {
    queue: Queue,
    client: ClientId,
    now_us: u64,
}

impl Bench {
    fn new() -> Self {
        Self { queue: Queue::default(), client: ClientId::random(), now_us: START }
    }

    fn ask(&self, owner: OwnerId, keys: &[(&str, Mode)]) -> Acquire {
        let wants = keys
            .iter()
            .map(|(key, mode)| Want::new(ResourceKey::parse(key).unwrap(), *mode))
            .collect();
        let partition = Partition(0);
        Acquire {
            part: Part { partition, owner, request: RequestId::next(), wants },
            client: self.client,
            lease: Lease::new(Duration::from_secs(3)).unwrap(),
            standing: Standing::Fresh,
            wait: true,
            floor: None,
            limit: 8,
            block: 1,
            metadata: None,
        }
    }

    fn acquire(&mut self, ask: &Acquire) -> Acquired {
        self.queue.acquire(self.now_us, ask).unwrap()
    }

    fn release(&mut self, ask: &Acquire) -> Released {
        self.queue.release(self.now_us, &ask.part).unwrap()
    }

    fn renew(&mut self, ask: &Acquire, waiting: bool) -> Renewed {
        let renewal = Renewal { part: ask.part.clone(), lease: ask.lease, waiting };
        self.queue.renew(self.now_us, &[renewal]).unwrap().remove(0)
    }

    fn owner(&self) -> OwnerId {
        OwnerId::new(self.client)
    }

    fn handed(&mut self) -> Vec<RequestId> {
        self.queue.take_hand_overs().into_iter().map(|over| over.grant.request).collect()
    }
}

fn tokens(acquired: &Acquired) -> Vec<u64> {
    match acquired {
        Acquired::Granted(grant) => grant.tokens.iter().map(|token| token.get()).collect(),
        other => panic!("not granted: {other:?}"),
    }
}

use Mode::{Exclusive as X, Shared as S};

#[test]
fn a_release_hands_over_to_the_first_in_line_in_the_same_step() {
    let mut b = Bench::new();
    let (o1, o2, o3) = (b.owner(), b.owner(), b.owner());
    let first = b.ask(o1, &[("k", X)]);
    let second = b.ask(o2, &[("k", X)]);
    let third = b.ask(o3, &[("k", X)]);
    let token = tokens(&b.acquire(&first))[0];
    assert!(matches!(b.acquire(&second), Acquired::Queued { position: 0, .. }));
    assert!(matches!(b.acquire(&third), Acquired::Queued { position: 1, .. }));
    assert_eq!(b.release(&first), Released::Released);
    assert_eq!(b.handed(), [second.part.request]);
    assert!(tokens(&b.acquire(&second))[0] > token);
    assert_eq!(b.release(&first), Released::Gone, "a second copy changes nothing");
    assert_eq!(b.handed(), []);
}

#[test]
fn re_entry_passes_writers_in_line_and_keeps_the_token() {
    let mut b = Bench::new();
    let (o1, o2) = (b.owner(), b.owner());
    let first = b.ask(o1, &[("k", X)]);
    let writer = b.ask(o2, &[("k", X)]);
    let token = tokens(&b.acquire(&first));
    b.acquire(&writer);
    let again = Acquire { standing: Standing::Incremental, ..b.ask(o1, &[("k", S)]) };
    assert_eq!(tokens(&b.acquire(&again)), token);
    assert_eq!(tokens(&b.acquire(&again)), token, "a resent request counts once");
    assert_eq!(b.queue.inspect(b.now_us, &first.part.wants[0].key).holders.len(), 2);
    b.release(&first);
    assert_eq!(b.handed(), [], "the shared entry still holds the writer off");
    b.release(&again);
    assert_eq!(b.handed(), [writer.part.request]);
}

#[test]
fn readers_share_and_a_reader_behind_a_writer_waits() {
    let mut b = Bench::new();
    let (o1, o2, o3, o4) = (b.owner(), b.owner(), b.owner(), b.owner());
    let (r1, r2, w, r3) = (
        b.ask(o1, &[("k", S)]),
        b.ask(o2, &[("k", S)]),
        b.ask(o3, &[("k", X)]),
        b.ask(o4, &[("k", S)]),
    );
    b.acquire(&r1);
    tokens(&b.acquire(&r2));
    assert!(matches!(b.acquire(&w), Acquired::Queued { .. }));
    assert!(matches!(b.acquire(&r3), Acquired::Queued { .. }));
    b.release(&r1);
    b.release(&r2);
    assert_eq!(b.handed(), [w.part.request]);
    b.release(&w);
    assert_eq!(b.handed(), [r3.part.request]);
}

#[test]
fn a_set_is_held_as_a_whole_or_not_at_all() {
    let mut b = Bench::new();
    let (o1, o2) = (b.owner(), b.owner());
    let one = b.ask(o1, &[("b", X)]);
    b.acquire(&one);
    let all = Acquire { wait: false, ..b.ask(o2, &[("a", X), ("b", X), ("c", X)]) };
    let Acquired::Busy { key, holders, waiters } = b.acquire(&all) else { panic!() };
    assert_eq!((key.as_str(), holders, waiters), ("b", vec![o1], false));
    for key in ["a", "c"] {
        let seen = b.queue.inspect(b.now_us, &ResourceKey::parse(key).unwrap());
        assert_eq!(seen, Inspection::default());
    }
}

#[test]
fn a_dead_waiter_that_was_promoted_holds_only_its_claim() {
    let mut b = Bench::new();
    let (o1, o2, o3) = (b.owner(), b.owner(), b.owner());
    let (first, dead, next) =
        (b.ask(o1, &[("k", X)]), b.ask(o2, &[("k", X)]), b.ask(o3, &[("k", X)]));
    b.acquire(&first);
    b.acquire(&dead);
    b.acquire(&next);
    b.release(&first);
    assert_eq!(b.handed(), [dead.part.request]);
    b.now_us += 1_000_000;
    let Renewed::Queued { ask_again_in } = b.renew(&next, true) else { panic!() };
    assert!(ask_again_in <= Duration::from_millis(1_001), "{ask_again_in:?}");
    b.now_us += 1_001_000;
    assert!(matches!(b.renew(&next, true), Renewed::Held(Some(_))));
    assert_eq!(b.renew(&dead, true), Renewed::Lost);
}

#[test]
fn a_lapsed_lease_is_lost_for_its_holder_and_found_by_the_next_who_looks() {
    let mut b = Bench::new();
    let (o1, o2) = (b.owner(), b.owner());
    let (slow, other) = (b.ask(o1, &[("a", X), ("b", X)]), b.ask(o2, &[("b", X)]));
    b.acquire(&slow);
    b.now_us += 3_000_000;
    tokens(&b.acquire(&other));
    assert_eq!(b.renew(&slow, false), Renewed::Lost);
    assert_eq!(b.release(&slow), Released::Gone);
    assert_eq!(b.queue.inspect(b.now_us, &other.part.wants[0].key).holders[0].owner, o2);
}

#[test]
fn a_grant_after_a_lapse_has_a_new_token_though_nobody_has_seen_the_lapse() {
    let mut b = Bench::new();
    let (o1, o2) = (b.owner(), b.owner());
    let (old, other) = (b.ask(o1, &[("b", S)]), b.ask(o2, &[("a", X)]));
    let token = tokens(&b.acquire(&old))[0];
    b.acquire(&other);
    b.now_us += 2_000_000;
    assert_eq!(b.renew(&other, false), Renewed::Held(None));
    let both = b.ask(o1, &[("a", X), ("b", S)]);
    assert!(matches!(b.acquire(&both), Acquired::Queued { .. }));
    b.now_us += 1_500_000;
    b.release(&other);
    assert_eq!(b.handed(), [both.part.request]);
    assert!(tokens(&b.acquire(&both))[1] > token);
}

#[test]
fn a_late_copy_of_a_cancelled_request_is_never_granted() {
    let mut b = Bench::new();
    let o1 = b.owner();
    let ask = b.ask(o1, &[("k", X)]);
    b.queue.cancel(b.now_us, &ask.part).unwrap();
    assert_eq!(b.acquire(&ask), Acquired::Cancelled);
    assert!(b.queue.is_idle());
}

#[test]
fn a_cancel_that_is_sent_twice_is_remembered_once_and_not_for_ever() {
    let mut b = Bench::new();
    let o1 = b.owner();
    let ask = b.ask(o1, &[("k", X)]);
    b.queue.cancel(b.now_us, &ask.part).unwrap();
    let once = b.queue.clone();
    b.queue.cancel(b.now_us, &ask.part).unwrap();
    assert_eq!(b.queue, once);
    b.queue.sweep(b.now_us + micros(TOMBSTONE)).unwrap();
    assert_eq!(b.queue, Queue::default());
}

#[test]
fn cancelling_a_waiter_lets_those_behind_it_through() {
    let mut b = Bench::new();
    let (o1, o2, o3) = (b.owner(), b.owner(), b.owner());
    let (r, w, r2) = (b.ask(o1, &[("k", S)]), b.ask(o2, &[("k", X)]), b.ask(o3, &[("k", S)]));
    b.acquire(&r);
    b.acquire(&w);
    b.acquire(&r2);
    b.queue.cancel(b.now_us, &w.part).unwrap();
    assert_eq!(b.handed(), [r2.part.request]);
}

#[test]
fn the_hold_limit_and_the_upgrade_are_refused_and_leave_nothing() {
    let mut b = Bench::new();
    let o1 = b.owner();
    let first = b.ask(o1, &[("k", S)]);
    b.acquire(&first);
    let before = b.queue.clone();
    let more = Acquire { limit: 1, standing: Standing::Incremental, ..b.ask(o1, &[("k", S)]) };
    assert!(matches!(b.acquire(&more), Acquired::LimitReached { .. }));
    let up = Acquire { standing: Standing::Incremental, ..b.ask(o1, &[("k", X)]) };
    assert!(matches!(b.acquire(&up), Acquired::Upgrade { .. }));
    assert_eq!(b.queue, before);
}

#[test]
fn sweeping_leaves_nothing_of_what_has_lapsed() {
    let mut b = Bench::new();
    let (o1, o2) = (b.owner(), b.owner());
    let (held, waiter) = (b.ask(o1, &[("k", X)]), b.ask(o2, &[("k", X)]));
    b.acquire(&held);
    b.acquire(&waiter);
    b.queue.sweep(b.now_us + 10_000_000).unwrap();
    assert!(b.queue.is_idle());
}

#[test]
fn a_waiter_is_not_promoted_to_an_upgrade_of_what_its_owner_came_to_hold() {
    let mut b = Bench::new();
    let (o1, o2) = (b.owner(), b.owner());
    let (reader, writer) = (b.ask(o1, &[("k", S)]), b.ask(o2, &[("k", X)]));
    b.acquire(&reader);
    assert!(matches!(b.acquire(&writer), Acquired::Queued { .. }));
    // Another process, to which the writer's owner id was sent, reads.
    let elsewhere = Acquire { wait: false, ..b.ask(o2, &[("k", S)]) };
    let shared = tokens(&b.acquire(&elsewhere))[0];
    b.release(&reader);
    assert_eq!(b.handed(), [], "its own shared entry is in the way");
    b.release(&elsewhere);
    let over = b.queue.take_hand_overs().remove(0);
    assert_eq!(over.grant.request, writer.part.request);
    assert!(over.grant.tokens[0].get() > shared);
}

#[test]
fn the_token_of_an_entry_that_has_lapsed_is_not_given_out_again() {
    let mut b = Bench::new();
    let (o1, o2, o3) = (b.owner(), b.owner(), b.owner());
    let old = b.ask(o1, &[("a", X)]);
    let stale = tokens(&b.acquire(&old))[0];
    let busy =
        Acquire { lease: Lease::new(Duration::from_secs(60)).unwrap(), ..b.ask(o3, &[("b", X)]) };
    b.acquire(&busy);
    let other = b.ask(o2, &[("a", X), ("b", X)]);
    let again = b.ask(o1, &[("a", X), ("b", X)]);
    b.now_us += 1_000_000;
    b.acquire(&other);
    b.acquire(&again);
    // The first entry lapses, and the next steps look at other keys first.
    b.now_us += 2_000_000;
    b.release(&busy);
    assert_eq!(b.handed(), [other.part.request]);
    b.release(&other);
    let over = b.queue.take_hand_overs().remove(0);
    assert_eq!(over.grant.request, again.part.request);
    assert!(over.grant.tokens.iter().all(|token| token.get() > stale), "{over:?}");
}

#[test]
fn an_acquire_that_is_sent_again_after_the_hand_over_is_held_for_a_whole_lease() {
    let mut b = Bench::new();
    let (o1, o2) = (b.owner(), b.owner());
    let (first, second) = (b.ask(o1, &[("k", X)]), b.ask(o2, &[("k", X)]));
    b.acquire(&first);
    b.acquire(&second);
    b.release(&first);
    tokens(&b.acquire(&second));
    let seen = b.queue.inspect(b.now_us, &second.part.wants[0].key);
    assert_eq!(seen.holders[0].expires_in, second.lease.get());
}

#[test]
fn a_block_is_reserved_by_the_grant_and_the_next_token_is_above_it() {
    let mut b = Bench::new();
    let first = Acquire { block: 256, ..b.ask(b.owner(), &[("a", X), ("b", X)]) };
    let Acquired::Granted(grant) = b.acquire(&first) else { panic!("not granted") };
    assert_eq!((grant.block, grant.tokens[0], grant.tokens[1]), (256, token(START), token(START)));
    let Acquired::Granted(copy) = b.acquire(&first) else { panic!("not granted") };
    assert_eq!((copy.block, copy.tokens), (1, grant.tokens), "a copy of the answer knows of one");
    let waiter = Acquire { block: 10, ..b.ask(b.owner(), &[("a", X)]) };
    assert!(matches!(b.acquire(&waiter), Acquired::Queued { .. }));
    assert_eq!(tokens(&b.acquire(&b.ask(b.owner(), &[("c", X)]))), [START + 256]);
    b.release(&first);
    let over = b.queue.take_hand_overs().remove(0);
    assert_eq!((over.grant.block, over.grant.tokens[0]), (10, token(START + 257)));
    assert_eq!(tokens(&b.acquire(&b.ask(b.owner(), &[("d", X)]))), [START + 267]);
}

#[test]
fn an_owner_that_holds_something_and_a_counter_that_runs_ahead_get_one_token() {
    let mut b = Bench::new();
    let owner = b.owner();
    let far = Acquire { block: 1000, ..b.ask(owner, &[("a", X)]) };
    assert_eq!(tokens(&b.acquire(&far)), [START]);
    let more = Acquire { block: 9, standing: Standing::Incremental, ..b.ask(owner, &[("b", X)]) };
    assert_eq!(tokens(&b.acquire(&more)), [START + 1000]);
    let other = Acquire { block: 9, ..b.ask(b.owner(), &[("c", X)]) };
    let Acquired::Granted(grant) = b.acquire(&other) else { panic!("not granted") };
    assert_eq!((grant.block, grant.tokens[0]), (1, token(START + 1001)));
}

#[test]
fn whoever_is_let_in_by_its_own_refresh_is_told_of_its_block_by_the_answer() {
    let mut b = Bench::new();
    let first = b.ask(b.owner(), &[("a", X)]);
    let second = Acquire { block: 10, ..b.ask(b.owner(), &[("a", X)]) };
    b.acquire(&first);
    b.acquire(&second);
    let again = [Renewal { part: second.part.clone(), lease: second.lease, waiting: true }];
    let most_of_it = u64::try_from(first.lease.get().as_micros()).unwrap() * 2 / 3;
    b.now_us += most_of_it;
    let queued = b.queue.renew(b.now_us, &again).unwrap().remove(0);
    assert!(matches!(queued, Renewed::Queued { .. }));
    b.now_us += most_of_it;
    let Renewed::Held(Some(grant)) = b.queue.renew(b.now_us, &again).unwrap().remove(0) else {
        panic!("not held")
    };
    assert_eq!(grant.block, 10);
    b.queue.take_hand_overs();
    let Renewed::Held(Some(copy)) = b.queue.renew(b.now_us, &again).unwrap().remove(0) else {
        panic!("not held")
    };
    assert_eq!((copy.block, copy.tokens), (1, grant.tokens), "the next call knows of one");
}

#[test]
fn whoever_stands_directly_before_a_waiter_is_told_that_it_is_followed() {
    let mut b = Bench::new();
    let [one, two, three] = [(); 3].map(|()| b.ask(b.owner(), &[("a", X), ("b", X)]));
    let told = |b: &mut Bench| -> Vec<RequestId> {
        b.queue.take_followed().into_iter().map(|by| by.request).collect()
    };
    b.acquire(&one);
    assert_eq!(told(&mut b), []);
    b.acquire(&two);
    assert_eq!(told(&mut b), [one.part.request], "once, though it is before it on both keys");
    b.acquire(&three);
    assert_eq!(told(&mut b), [two.part.request]);
    b.renew(&three, true);
    assert_eq!(told(&mut b), [two.part.request], "a refresh repeats it");
    b.queue.cancel(b.now_us, &two.part).unwrap();
    b.renew(&three, true);
    assert_eq!(told(&mut b), [one.part.request]);
    b.acquire(&b.ask(b.owner(), &[("c", S)]));
    b.acquire(&b.ask(b.owner(), &[("c", X)]));
    assert_eq!(told(&mut b), [], "readers pass nothing on");
}
