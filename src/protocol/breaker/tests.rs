use std::collections::{HashMap, HashSet, VecDeque};

use proptest::prelude::*;

use super::*;

const LIMIT: Duration = Duration::from_millis(1_600);
const PATIENCE: Duration = Duration::from_secs(2);

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn breaker() -> Breaker {
    Breaker::new(BreakerOptions::default(), LIMIT)
}

/// One that three failures have just opened.
fn opened() -> Breaker {
    let mut breaker = breaker();
    for _ in 0..3 {
        let ticket = breaker.admit(ms(0)).unwrap();
        breaker.failed(ticket, ms(0), 0.0);
    }
    assert_eq!(breaker.state(), BreakerState::Open);
    breaker
}

fn half_opened() -> Breaker {
    let mut breaker = opened();
    let ping = breaker.ping(ms(100)).unwrap();
    breaker.succeeded(ping, ms(101));
    assert_eq!(breaker.state(), BreakerState::HalfOpen);
    breaker
}

#[test]
fn it_opens_after_three_failures_in_a_row_and_a_success_starts_the_count_anew() {
    let mut breaker = breaker();
    for answers in ["ff", "sff", "sff", "f"] {
        assert_eq!(breaker.state(), BreakerState::Closed, "before {answers}");
        for answer in answers.chars() {
            let ticket = breaker.admit(ms(0)).unwrap();
            match answer {
                'f' => breaker.failed(ticket, ms(0), 0.0),
                _ => breaker.succeeded(ticket, ms(0)),
            }
        }
    }
    assert_eq!(breaker.state(), BreakerState::Open);
    assert_eq!(breaker.admit(ms(30)), Err(Refused { asked_in: ms(70) }));
}

#[test]
fn it_opens_when_half_of_ten_calls_within_the_window_have_failed() {
    let mut breaker = breaker();
    for call in 0..9 {
        let ticket = breaker.admit(ms(call)).unwrap();
        match call % 2 {
            0 => breaker.failed(ticket, ms(call), 0.0),
            _ => breaker.succeeded(ticket, ms(call)),
        }
    }
    assert_eq!(breaker.state(), BreakerState::Closed);
    let last = breaker.admit(ms(9)).unwrap();
    let (mut soon, mut late) = (breaker.clone(), breaker);
    soon.failed(last, ms(9), 0.0);
    assert_eq!(soon.state(), BreakerState::Open);
    late.failed(last, ms(10_001), 0.0);
    assert_eq!(late.state(), BreakerState::Closed, "the first failure is past");
}

#[test]
fn failures_far_apart_are_in_a_row_too() {
    let mut breaker = breaker();
    for minute in 0..3 {
        let ticket = breaker.admit(ms(minute * 60_000)).unwrap();
        breaker.failed(ticket, ms(minute * 60_000), 0.0);
    }
    assert_eq!(breaker.state(), BreakerState::Open);
}

#[test]
fn it_stays_open_longer_each_time_and_never_longer_than_its_maximum() {
    let mut breaker = opened();
    let mut now = ms(0);
    let mut waits = Vec::new();
    for _ in 0..5 {
        let at = breaker.ping_at().unwrap();
        assert_eq!(breaker.ping(at - ms(1)), None);
        waits.push(at - now);
        now = at + ms(5);
        let ping = breaker.ping(at).unwrap();
        assert_eq!(breaker.ping(now), None, "one ping at a time");
        breaker.failed(ping, now, 0.0);
    }
    assert_eq!(waits, [100, 200, 400, 800, 800].map(ms));
}

#[test]
fn a_ping_that_ends_with_its_time_out_is_heard_of() {
    let mut breaker = opened();
    let ping = breaker.ping(ms(100)).unwrap();
    let end = ms(100) + LIMIT;
    assert_eq!(breaker.ping(end), None, "the first has not said how it ended");
    breaker.failed(ping, end, 0.0);
    assert_eq!(breaker.ping_at(), Some(end + ms(200)));
}

#[test]
fn a_ping_half_opens_and_the_probe_closes_or_opens_again() {
    let mut breaker = half_opened();
    let probe = breaker.admit(ms(101)).unwrap();
    let waiting = breaker.admit(ms(102)).unwrap_err();
    assert_eq!(waiting.asked_in, Duration::ZERO);
    let mut worse = breaker.clone();
    worse.failed(probe, ms(103), 0.0);
    assert_eq!(worse.admit(ms(103)), Err(Refused { asked_in: ms(200) }));
    breaker.succeeded(probe, ms(103));
    assert!(breaker.is_calm());
    assert_eq!(breaker.ping_at(), None);
}

#[test]
fn a_probe_that_vanished_is_followed_by_another() {
    let mut breaker = half_opened();
    let dropped = breaker.admit(ms(101)).unwrap();
    breaker.abandoned(dropped);
    let kept = breaker.admit(ms(102)).unwrap();
    breaker.abandoned(dropped);
    breaker.succeeded(dropped, ms(102));
    assert_eq!(breaker.state(), BreakerState::HalfOpen, "it gives nothing back twice");
    assert!(breaker.admit(ms(102) + PATIENCE - ms(1)).is_err());
    let next = breaker.admit(ms(102) + PATIENCE).unwrap();
    breaker.failed(kept, ms(3_000), 0.0);
    assert_eq!(breaker.state(), BreakerState::HalfOpen, "its time was over");
    breaker.succeeded(next, ms(3_000));
    assert_eq!(breaker.state(), BreakerState::Closed);
}

#[test]
fn what_was_sent_before_it_opened_neither_closes_it_nor_opens_it_again() {
    let mut breaker = breaker();
    let early: Vec<_> = (0..5).map(|_| breaker.admit(ms(0)).unwrap()).collect();
    for ticket in &early[..3] {
        breaker.failed(*ticket, ms(1), 0.0);
    }
    breaker.succeeded(early[3], ms(2));
    assert_eq!(breaker.state(), BreakerState::Open);
    let ping = breaker.ping(ms(101)).unwrap();
    breaker.succeeded(ping, ms(101));
    breaker.succeeded(early[3], ms(102));
    assert_eq!(breaker.state(), BreakerState::HalfOpen);
    let probe = breaker.admit(ms(103)).unwrap();
    breaker.succeeded(probe, ms(104));
    for _ in 0..5 {
        breaker.failed(early[4], ms(105), 0.0);
    }
    assert!(breaker.is_calm());
}

#[test]
fn one_that_is_disabled_never_opens() {
    let options = BreakerOptions { enabled: false, ..BreakerOptions::default() };
    let mut breaker = Breaker::new(options, LIMIT);
    for _ in 0..99 {
        let ticket = breaker.admit(ms(0)).unwrap();
        breaker.failed(ticket, ms(0), 0.0);
    }
    assert_eq!(breaker.state(), BreakerState::Closed);
    assert!(!breaker.is_calm(), "it knows of the failures");
    let ticket = breaker.admit(ms(10_001)).unwrap();
    breaker.succeeded(ticket, ms(10_001));
    assert!(breaker.is_calm());
}

/// A breaker with the calls that are under way. A small one, so that all of its ways can be gone.
#[derive(Clone)]
struct World {
    breaker: Breaker,
    /// With the time until which it may take, if it is a trial.
    calls: Vec<(Ticket, Option<Duration>)>,
    now: Duration,
}

const STEP: Duration = Duration::from_millis(1);

impl World {
    fn new() -> Self {
        let options = BreakerOptions {
            in_a_row: 2,
            calls: 3,
            window: STEP * 2,
            open: Backoff { first: STEP, max: STEP * 2, ..Backoff::default() },
            ..BreakerOptions::default()
        };
        // With a quarter more, two steps.
        let breaker = Breaker::new(options, STEP * 8 / 5);
        Self { breaker, calls: Vec::new(), now: Duration::ZERO }
    }

    /// All that may happen next.
    fn next(&self) -> Vec<World> {
        let mut next = Vec::new();
        let mut add = |change: &dyn Fn(&mut World)| {
            let mut world = self.clone();
            change(&mut world);
            next.push(world);
        };
        add(&|world| world.now += STEP);
        if self.calls.len() < 3 {
            add(&|world| {
                if let Ok(ticket) = world.breaker.admit(world.now) {
                    world.began(ticket);
                }
            });
            add(&|world| {
                if let Some(ticket) = world.breaker.ping(world.now) {
                    world.began(ticket);
                }
            });
            // One that is never refused, such as a renewal.
            add(&|world| world.began(Ticket::Call { era: world.breaker.era() }));
        }
        for index in 0..self.calls.len() {
            add(&|world| world.ends(index, |breaker, ticket, now| breaker.succeeded(ticket, now)));
            add(&|world| world.ends(index, |breaker, ticket, now| breaker.failed(ticket, now, 0.)));
            add(&|world| world.ends(index, |breaker, ticket, _| breaker.abandoned(ticket)));
            // Kept and never polled again.
            add(&|world| world.ends(index, |_, _, _| {}));
        }
        next
    }

    fn began(&mut self, ticket: Ticket) {
        let trial = matches!(ticket, Ticket::Trial { .. });
        self.calls.push((ticket, trial.then(|| self.now + STEP * 2)));
    }

    /// A call ends, and the rules are checked by what the state was before and after.
    fn ends(&mut self, index: usize, how: impl Fn(&mut Breaker, Ticket, Duration)) {
        let (ticket, _) = self.calls.remove(index);
        let before = self.breaker.state();
        let era = self.breaker.era();
        how(&mut self.breaker, ticket, self.now);
        if self.breaker.state() != before {
            let decides = match ticket {
                Ticket::Call { era: sent } => before == BreakerState::Closed && sent == era,
                Ticket::Trial { .. } => before != BreakerState::Closed,
            };
            assert!(decides, "{ticket:?} changed {before:?} to {:?}", self.breaker.state());
        }
    }

    fn check(&self) {
        let live =
            |(_, until): &&(Ticket, Option<Duration>)| until.is_some_and(|until| self.now < until);
        let trials = self.calls.iter().filter(live).count();
        assert!(trials <= 1, "{trials} trials at once in {:?}", self.breaker);
        self.check_that_it_closes();
    }

    /// A service that works again is used again, whatever became of the calls under way.
    fn check_that_it_closes(&self) {
        let Self { mut breaker, mut now, .. } = self.clone();
        for _ in 0..9 {
            if let Some(ping) = breaker.ping(now) {
                breaker.succeeded(ping, now);
            }
            if let Ok(ticket) = breaker.admit(now) {
                breaker.succeeded(ticket, now);
            }
            now += STEP;
        }
        assert_eq!(breaker.state(), BreakerState::Closed, "stuck: {breaker:?} from {self:?}");
    }

    fn key(&self) -> impl std::hash::Hash + Eq + use<> {
        let Breaker { state, era, trials, .. } = self.breaker;
        (state, era, trials, self.calls.clone(), self.now)
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("World").field(&self.breaker).field(&self.calls).field(&self.now).finish()
    }
}

#[test]
fn on_every_short_way_there_is_one_probe_at_a_time_and_it_is_never_stuck() {
    const DEPTH: usize = 15;
    let start = World::new();
    let mut seen = HashSet::from([start.key()]);
    let mut ways = VecDeque::from([(start, 0)]);
    let mut states = HashMap::new();
    while let Some((world, depth)) = ways.pop_front() {
        world.check();
        *states.entry(world.breaker.state()).or_insert(0) += 1;
        if depth < DEPTH {
            let next = world.next().into_iter().filter(|world| seen.insert(world.key()));
            ways.extend(next.map(|world| (world, depth + 1)));
        }
    }
    assert!(
        states.len() == 3 && states.values().all(|count| *count > 1_000),
        "it was in too few states: {states:?}"
    );
}

proptest! {
    /// What opens a closed breaker is recounted from the whole history, answer by answer.
    #[test]
    fn it_opens_when_a_recount_of_all_answers_says_so(
        answers in prop::collection::vec((0_u64..4_000, prop::bool::weighted(0.55)), 1..60),
    ) {
        let mut breaker = breaker();
        let options = BreakerOptions::default();
        let (mut now, mut history) = (ms(0), Vec::new());
        for (later, good) in answers {
            now += ms(later);
            let ticket = breaker.admit(now).unwrap();
            history.push((now, good));
            match good {
                true => breaker.succeeded(ticket, now),
                false => breaker.failed(ticket, now, 0.5),
            }
            let row = history.iter().rev().take_while(|(_, good)| !good).count();
            let share = recount(&history, options.window);
            let enough = !good && (row >= 3 || share.is_some_and(|(bad, all)| {
                all >= 10 && bad * 2 >= all
            }));
            prop_assert_eq!(breaker.state() == BreakerState::Open, enough, "{:?}", history);
            if enough {
                break;
            }
        }
    }

    /// Whatever is done with it in whatever order.
    #[test]
    fn a_refusal_names_a_ping_that_is_near(
        steps in prop::collection::vec((0_u8..5, 0_u64..300), 1..200),
        chance in 0.0..1.0,
    ) {
        let mut breaker = breaker();
        let (mut now, mut calls) = (ms(0), Vec::new());
        for (step, later) in steps {
            now += ms(later);
            match step {
                0 => match breaker.admit(now) {
                    Ok(ticket) => calls.push(ticket),
                    Err(Refused { asked_in }) => {
                        prop_assert!(asked_in <= ms(800), "{:?}", asked_in);
                        prop_assert!(!breaker.is_calm());
                    }
                },
                1 => calls.extend(breaker.ping(now)),
                2 => calls.pop().into_iter().for_each(|ticket| breaker.succeeded(ticket, now)),
                3 => calls.pop().into_iter().for_each(|ticket| {
                    breaker.failed(ticket, now, chance);
                }),
                _ => calls.pop().into_iter().for_each(|ticket| breaker.abandoned(ticket)),
            }
        }
    }
}

/// Failures and calls since the failure with which the last window began.
fn recount(history: &[(Duration, bool)], window: Duration) -> Option<(usize, usize)> {
    let mut begun = None;
    for (index, (at, good)) in history.iter().enumerate() {
        if begun.is_some_and(|begun: usize| *at - history[begun].0 > window) {
            begun = None;
        }
        if begun.is_none() && !good {
            begun = Some(index);
        }
    }
    let calls = &history[begun?..];
    Some((calls.iter().filter(|(_, good)| !good).count(), calls.len()))
}
