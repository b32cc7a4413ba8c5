//! Reads the holds of W2.
//!
//! Tokens tell who was granted first: a hold with a higher token came later. All times are of one
//! clock, taken after a grant and before a question, so that what they prove is never too much.

use std::collections::HashMap;
use std::time::Duration;

use super::{Fault, Hold, Kind};
use crate::clock;
use crate::findings::Findings;
use crate::history::Outcome;

/// What a running holder may be told late, beyond what plain timers beside it were.
const GRACE: Duration = Duration::from_millis(100);

#[derive(Default)]
pub struct Seen {
    pub ok: u64,
    /// Holds that ended before the first fault.
    pub peaceful: u64,
    /// Holds whose key somebody else was granted before the holder's next call.
    pub overtaken: u64,
    /// Holders that ran, were cut off, and were told.
    pub told: u64,
    /// Those who were told before the next holder knew of its grant.
    pub told_first: u64,
    pub findings: Findings,
}

pub fn judge(holds: &[Hold], faults: &[Fault], peace: u64, lease: Duration) -> Seen {
    let mut seen = Seen::default();
    let mut of_key: HashMap<&str, Vec<&Hold>> = HashMap::new();
    for hold in holds {
        of_key.entry(&hold.key).or_default().push(hold);
    }
    for hold in holds {
        seen.ok += u64::from(hold.answer == Outcome::Ok);
        seen.peaceful += u64::from(hold.called < peace);
        if hold.answer == Outcome::Unknown {
            seen.findings.unknown += 1;
        }
        if hold.stopped >= clock::nanos(lease) && hold.answer == Outcome::Ok {
            let what = format!("stopped for longer than its lease, and the call worked: {hold:?}");
            seen.findings.violation(what);
        }
        seen.against_the_next(hold, &of_key[hold.key.as_str()], faults);
    }
    seen
}

impl Seen {
    /// A hold, and of those of its key whoever was granted the key after it, first of all.
    fn against_the_next(&mut self, hold: &Hold, holds: &[&Hold], faults: &[Fault]) {
        let conflicts = |other: &&Hold| other.token > hold.token && !(other.shared && hold.shared);
        let next = holds.iter().copied().filter(conflicts).min_by_key(|other| other.granted);
        let touched = |kind: Kind| {
            let worker = hold.id.split(['.', '-']).next().unwrap_or_default();
            faults.iter().any(|fault| {
                fault.kind == kind
                    && (fault.worker == worker || kind == Kind::Flush)
                    && fault.from <= hold.called
                    && fault.to >= hold.asked
            })
        };
        let flushed = touched(Kind::Flush);
        let runs = !touched(Kind::Stop);
        if let Some(told) = hold.told.filter(|_| hold.listens && runs && !flushed) {
            self.told += 1;
            let limit = hold.late + clock::nanos(GRACE);
            match next {
                Some(next) if told > next.granted + limit => {
                    self.findings.violation(format!("told too late: {hold:?}, by {next:?}"));
                }
                Some(next) => self.told_first += u64::from(told <= next.granted),
                None => self.told_first += 1,
            }
        }
        let Some(next) = next else { return };
        if hold.believed > next.granted && !flushed {
            self.findings.violation(format!("two holders: {hold:?} and {next:?}"));
        }
        if hold.called > next.granted {
            self.overtaken += 1;
            if hold.answer == Outcome::Ok {
                let what = format!("a loser's call worked: {hold:?}, overtaken by {next:?}");
                self.findings.violation(what);
            }
        }
    }
}
