//! Faults drawn from a seed.

use std::time::Duration;

use super::{Fault, Harm, Point, Side};

/// How often each fault strikes: a chance from 0 to 1 for each request, together at most 1.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    pub delay: f64,
    pub drop: f64,
    pub cut: f64,
    pub reset: f64,
    pub half_open: f64,
    pub trickle: f64,
    pub garbage: f64,
    pub lose_reply: f64,
    /// The longest delay.
    pub pause: Duration,
    /// The pause after each byte of a trickle.
    pub byte: Duration,
}

impl Default for Rates {
    /// No fault at all; delays of at most 50 ms, a byte per millisecond.
    fn default() -> Self {
        Self::each(0.0)
    }
}

impl Rates {
    /// Every fault strikes as often as every other one.
    pub fn each(chance: f64) -> Self {
        Self {
            delay: chance,
            drop: chance,
            cut: chance,
            reset: chance,
            half_open: chance,
            trickle: chance,
            garbage: chance,
            lose_reply: chance,
            pause: Duration::from_millis(50),
            byte: Duration::from_millis(1),
        }
    }
}

/// What befalls the requests to come.
#[derive(Debug)]
pub(super) struct Schedule {
    seed: u64,
    rates: Rates,
    request: u64,
}

impl Schedule {
    pub(super) fn new(seed: u64, rates: Rates) -> Self {
        Self { seed, rates, request: 0 }
    }

    /// What befalls the next request.
    pub(super) fn draw(&mut self) -> Option<Fault> {
        // Each request has a generator of its own: what one of them draws does not move the others.
        let step = self.request.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut random = fastrand::Rng::with_seed(self.seed ^ step);
        self.request += 1;
        let rates = &self.rates;
        let at = Point::ALL[random.usize(..Point::ALL.len())];
        let side = if random.bool() { Side::Client } else { Side::Server };
        let pause = rates.pause.mul_f64(random.f64());
        let harms = [
            (rates.lose_reply, Fault::LoseReply),
            (rates.delay, Fault::At(at, Harm::Delay(pause))),
            (rates.drop, Fault::At(at, Harm::Drop)),
            (rates.cut, Fault::At(at, Harm::Cut)),
            (rates.reset, Fault::At(at, Harm::Reset)),
            (rates.half_open, Fault::At(at, Harm::HalfOpen(side))),
            (rates.trickle, Fault::At(at, Harm::Trickle(rates.byte))),
            (rates.garbage, Fault::At(at, Harm::Garbage(random.u64(..)))),
        ];
        let mut chance = random.f64();
        harms.into_iter().find_map(|(rate, fault)| {
            chance -= rate;
            (chance < 0.0).then_some(fault)
        })
    }
}
