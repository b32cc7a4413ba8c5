//! The model as stateright sees it: actions, steps and properties; and how a run is reported.

use std::time::{Duration, Instant};

use palisade::protocol::Renewal;
use stateright::{Checker, HasDiscoveries, Model, Path, Property};

use crate::drain::Drained;
use crate::service::{Id, Seen};
use crate::world::{LEASE, Phase, Promise, State, Wish, World};

/// One step. Orders and requests are named by their places.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Begin {
        client: usize,
        set: Vec<Wish>,
        lost: bool,
        copy: bool,
    },
    Proceed {
        client: usize,
        order: usize,
        lost: bool,
    },
    Retry {
        client: usize,
        order: usize,
    },
    Resend {
        client: usize,
        order: usize,
    },
    /// A push, or an answer that was late, arrives.
    Hear {
        client: usize,
        order: usize,
    },
    Refresh {
        client: usize,
        order: usize,
    },
    /// The watchdog renews, and finds that a lease was lost.
    Keep {
        client: usize,
        order: usize,
    },
    Release {
        client: usize,
        order: usize,
    },
    GiveUp {
        client: usize,
        order: usize,
    },
    /// A release or a cancel arrives.
    Deliver {
        client: usize,
        loose: usize,
    },
    Copy {
        id: Id,
    },
    Crash {
        client: usize,
    },
    Lapse {
        id: Id,
    },
}

pub const EXCLUSION: &str = "no two owners hold a key in conflicting modes";
pub const NO_DEADLOCK: &str = "nobody waits for ever";
pub const NO_LEAK: &str = "nothing is left behind";
pub const WAKE_UP: &str = "whoever is unblocked is granted in the same step";
pub const REFRESH: &str = "a waiter's own refresh finds what has lapsed";
pub const LINE: &str = "everyone stands in line on each key, in the order of arrival";
pub const FIFO: &str = "fresh requests are served first come, first served";
pub const RE_ENTRY: &str = "re-entry is granted at once with the same token";
pub const PASSES: &str = "an addition passes those who wait";
pub const REFUSAL: &str = "a refused request leaves nothing";
pub const RESEND: &str = "a call that is sent twice changes nothing";
pub const TOKEN: &str = "tokens grow per key from owner to owner";

impl Model for World {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let mut state = State::new(self);
        state.encode(self);
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let late = self.until.is_some_and(|until| Instant::now() > until);
        if state.broken.is_some() || late {
            return;
        }
        let seen = &state.seen;
        for client in 0..state.clients.len() {
            if !state.clients[client].crashed {
                self.client_actions(state, seen, client, actions);
            }
        }
        for seen in seen.iter().filter(|seen| seen.live) {
            let request = state.find(seen.id).expect("the model knows every request");
            let abandoned = matches!(request.phase, Phase::Gone | Phase::Settling { .. });
            if abandoned || self.faults.live_lapse {
                actions.push(Action::Lapse { id: seen.id });
            }
        }
        let copies = state.all().filter(|(_, request)| request.copy);
        actions.extend(copies.map(|(_, request)| Action::Copy { id: request.id() }));
    }

    fn next_state(&self, old: &State, action: Action) -> Option<State> {
        let mut state = old.clone();
        state.drained = std::sync::OnceLock::new();
        let time_passes = matches!(action, Action::Lapse { .. });
        state.step(self, action);
        state.account(self, old);
        if !time_passes {
            let lapsed = |seen: &&Seen| seen.deadline_us <= state.now_us;
            let before = old.seen.iter().filter(|seen| !seen.live).count();
            assert!(state.seen.iter().filter(lapsed).count() <= before, "nothing lapses by itself");
        }
        if !self.faults.late_pushes {
            state.hear_all();
        }
        state.tidy();
        state.encode(self);
        (state.code != old.code).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(EXCLUSION, |world: &World, state: &State| {
                let seen = &state.seen;
                let holds = |seen: &&Seen| seen.held && seen.live;
                let mut pairs = seen.iter().filter(holds);
                world.first(
                    EXCLUSION,
                    !pairs.any(|one| seen.iter().filter(holds).any(|other| one.conflicts(other))),
                )
            }),
            Property::always(NO_DEADLOCK, |world: &World, state: &State| {
                world.first(NO_DEADLOCK, state.drained(world) != Drained::Deadlock)
            }),
            Property::always(NO_LEAK, |world: &World, state: &State| {
                world.first(NO_LEAK, state.drained(world) != Drained::Leak)
            }),
            Property::always(WAKE_UP, |world: &World, state: &State| {
                world.first(WAKE_UP, state.unblocked(true).is_none())
            }),
            Property::always(REFRESH, |world: &World, state: &State| {
                world.first(REFRESH, state.refresh_helps(world))
            }),
            Property::always(LINE, |world: &World, state: &State| {
                world.first(LINE, state.lines_are_orderly(world))
            }),
            Property::always(FIFO, |world: &World, state: &State| {
                world.first(FIFO, state.broken != Some(Promise::Line))
            }),
            Property::always(RE_ENTRY, |world: &World, state: &State| {
                world.first(RE_ENTRY, state.broken != Some(Promise::ReEntry))
            }),
            Property::always(PASSES, |world: &World, state: &State| {
                world.first(PASSES, state.broken != Some(Promise::Passes))
            }),
            Property::always(REFUSAL, |world: &World, state: &State| {
                world.first(REFUSAL, state.broken != Some(Promise::Refusal))
            }),
            Property::always(RESEND, |world: &World, state: &State| {
                world.first(RESEND, state.broken != Some(Promise::Resend))
            }),
            Property::always(TOKEN, |world: &World, state: &State| {
                world.first(TOKEN, state.broken != Some(Promise::Token))
            }),
        ]
    }
}

impl World {
    /// Notes the first failure of a property and overlooks later ones, since the checker would
    /// report the last that it came across.
    fn first(&self, name: &'static str, holds: bool) -> bool {
        holds || !self.failed.lock().unwrap().insert(name)
    }

    fn client_actions(
        &self,
        state: &State,
        seen: &[Seen],
        client: usize,
        actions: &mut Vec<Action>,
    ) {
        let faults = self.faults;
        let Some(me) = state.clients.get(client) else { return };
        let idle = me.orders.iter().all(|order| order.is_complete());
        if me.orders.len() < self.orders && (faults.concurrent || idle) {
            let copies = faults.copies && !state.all().any(|(_, request)| request.copy);
            for set in &self.menu {
                let begin = |lost, copy| Action::Begin { client, set: set.clone(), lost, copy };
                actions.push(begin(false, false));
                actions.extend(faults.lost_replies.then(|| begin(true, false)));
                actions.extend(copies.then(|| begin(faults.lost_replies, true)));
            }
        }
        for order in 0..me.orders.len() {
            self.order_actions(state, seen, (client, order), actions);
        }
        let settling = me.loose.iter().enumerate();
        let settling =
            settling.filter(|(_, request)| matches!(request.phase, Phase::Settling { .. }));
        actions.extend(settling.map(|(loose, _)| Action::Deliver { client, loose }));
        if faults.crash && me.all().next().is_some() {
            actions.push(Action::Crash { client });
        }
    }

    fn order_actions(
        &self,
        state: &State,
        seen: &[Seen],
        (client, at): (usize, usize),
        actions: &mut Vec<Action>,
    ) {
        let faults = self.faults;
        let order = &state.clients[client].orders[at];
        let there = |id: Id| seen.iter().find(|seen| seen.id == id);
        if order.is_complete() {
            actions.push(Action::Release { client, order: at });
        } else if faults.give_up {
            actions.push(Action::GiveUp { client, order: at });
        }
        let mut entries = order.requests.iter().filter(|request| request.phase == Phase::Held);
        if !entries.all(|request| there(request.id()).is_some_and(|seen| seen.live)) {
            actions.push(Action::Keep { client, order: at });
        }
        match order.open() {
            Some(open) => {
                let known = there(open.id());
                if open.phase == Phase::Unsure {
                    actions.push(Action::Resend { client, order: at });
                } else if known.is_none_or(|seen| seen.held) || seen.iter().any(|seen| !seen.live) {
                    actions.push(Action::Refresh { client, order: at });
                }
                if known.is_some_and(|seen| seen.held && seen.live) {
                    actions.push(Action::Hear { client, order: at });
                }
            }
            None if order.backs_off.is_some() => actions.push(Action::Retry { client, order: at }),
            None if !order.is_complete() => {
                actions.push(Action::Proceed { client, order: at, lost: false });
                if faults.lost_replies {
                    actions.push(Action::Proceed { client, order: at, lost: true });
                }
            }
            None => {}
        }
    }

    /// Explores until everything was seen, the property `expected` or (without it) any has failed,
    /// or about `most` transitions were taken. `PALISADE_MODEL_SECONDS` sets a time instead of
    /// `most`.
    pub fn run(mut self, most: usize, expected: Option<&'static str>) -> Report {
        let (name, started) = (self.name, Instant::now());
        let finish = match expected {
            Some(property) => HasDiscoveries::AllOf([property].into()),
            None => HasDiscoveries::AnyFailures,
        };
        let seconds = std::env::var("PALISADE_MODEL_SECONDS").ok();
        let seconds = seconds.map(|text| text.parse().expect("PALISADE_MODEL_SECONDS is a number"));
        // stateright's own time limit is not looked at by a checker with one thread, and with more
        // the first counterexample would not be a shortest one.
        self.until = seconds.map(|seconds| started + Duration::from_secs(seconds));
        let until = self.until;
        let mut checker = self.checker().threads(1).finish_when(finish);
        if until.is_none() {
            checker = checker.target_state_count(most);
        }
        let checker = checker.spawn_bfs().join();
        let (states, transitions) = (checker.unique_state_count(), checker.state_count());
        let failures: Vec<_> = checker.discoveries().into_iter().collect();
        let in_bounds = until.map_or(transitions < most, |until| Instant::now() < until);
        let how = match (failures.is_empty(), in_bounds) {
            (false, _) => "stopped at a failure",
            (true, true) => "complete",
            (true, false) => "cut off",
        };
        let (depth, time) = (checker.max_depth(), started.elapsed());
        println!(
            "model {name}: {states} states, {transitions} transitions, depth {depth}, {how}, \
             {time:.1?}"
        );
        Report { states, failures }
    }
}

pub struct Report {
    pub states: usize,
    pub failures: Vec<(&'static str, Path<State, Action>)>,
}

impl Report {
    /// Nothing failed, and at least `floor` states were seen.
    pub fn holds(&self, floor: usize) {
        for (property, path) in &self.failures {
            println!("  fails: {property}");
            path.clone().into_actions().iter().for_each(|action| println!("    {action:?}"));
        }
        assert!(self.failures.is_empty(), "a promise is broken; the steps are above");
        assert!(self.states >= floor, "only {} states, expected {floor}", self.states);
    }

    /// The property failed, as it should, after this number of steps.
    pub fn fails(&self, expected: &'static str) -> usize {
        let found = self.failures.iter().find(|(property, _)| *property == expected);
        let (_, path) = found.unwrap_or_else(|| panic!("no counterexample to: {expected}"));
        let steps = path.clone().into_actions().len();
        println!("  caught in {steps} steps: {expected}");
        assert!(steps > 0, "not before anything has happened");
        steps
    }
}

impl State {
    fn step(&mut self, world: &World, action: Action) {
        match action {
            Action::Begin { client, set, lost, copy } => {
                self.begin(world, client, &set, lost);
                if copy {
                    let last = self.requests.into();
                    let mut all = self.clients[client].all_mut();
                    let newest = all.find(|request| request.id().1 == last);
                    newest.into_iter().for_each(|request| request.copy = true);
                }
            }
            Action::Proceed { client, order, lost } => self.proceed(world, (client, order), lost),
            Action::Retry { client, order } => self.retry(world, (client, order)),
            Action::Resend { client, order } => self.resend(world, (client, order)),
            Action::Hear { client, order } => self.granted((client, order)),
            Action::Refresh { client, order } => self.refresh(world, (client, order)),
            Action::Keep { client, order } => self.keep(world, (client, order)),
            Action::Release { client, order } | Action::GiveUp { client, order } => {
                self.fail(world, (client, order));
            }
            Action::Deliver { client, loose } => self.deliver(client, loose),
            Action::Copy { id } => self.copy_arrives(world, id),
            Action::Crash { client } => self.crash(client),
            Action::Lapse { id } => {
                self.lapse(world, &[id]);
                if !world.faults.lazy {
                    self.sweep();
                }
            }
        }
    }

    /// Whether a waiter that only lapsed leases hold up is granted when it refreshes, unless
    /// somebody before it was let through in that very step.
    fn refresh_helps(&self, world: &World) -> bool {
        let Some(waiter) = self.unblocked(false) else { return true };
        let Some(request) = self.find(waiter.id) else { return true };
        let part = request.ask.part.clone();
        let mut later = self.clone();
        let renewal = Renewal { part, lease: *LEASE, waiting: true };
        later.queues[waiter.partition].renew(later.now_us, &[renewal]).unwrap();
        later.seen = later.look(world).into();
        later.unblocked(false).is_none_or(|still| still.id != waiter.id)
    }

    /// Whether each line holds exactly those who wait for the key, in the order of their arrival.
    fn lines_are_orderly(&self, world: &World) -> bool {
        self.seen
            .iter()
            .filter(|seen| !seen.held)
            .all(|seen| self.find(seen.id).is_some_and(|r| r.wishes.len() == seen.keys().count()))
            && world.names.iter().enumerate().all(|(key, name)| {
                let queue = &self.queues[usize::from(world.partitions[key])];
                let line = queue.inspect(0, name).waiters;
                let places = line.iter().map(|waiter| {
                    self.find((waiter.owner, waiter.request)).and_then(|request| request.ticket)
                });
                places.is_sorted()
            })
    }
}
