//! The client's half of the rules, [`palisade::protocol::admit`], and ways to get it wrong.

use palisade::protocol::{Admission, Standing, admit};
use palisade::{Partition, Want};

/// A client that breaks one of its rules, to see it caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sloppy {
    /// An owner may have two requests for new keys outstanding (F1 of the report).
    TwoOutstanding,
    /// A mix of held and new keys is asked for in one call, again and again (F2).
    Mixed,
    /// Additions are retried in key order, while sets are taken in partition order (F5).
    TwoOrders,
    /// The client does not consider what the owner holds in other partitions.
    HeldElsewhereUntold,
    /// The client does not consider what the owner waits for in other partitions.
    WaitsElsewhereUntold,
    /// A refused addition is retried whatever its order.
    UnsortedRetry,
    /// An addition asks to stand in line whatever its order.
    AdditionQueues,
    /// Shared to exclusive is asked for, and may stand in line.
    UpgradeAsks,
    /// A process to which an owner's id was sent may wait with it.
    ForeignWaits,
}

/// The books of a client, as `admit` wants them.
pub struct Books<'a> {
    pub held: &'a [(Partition, Want)],
    /// The partitions in which the owner has a request for new keys outstanding.
    pub outstanding: &'a [Partition],
    pub local: bool,
}

/// Asks the production rule, then spoils its answer.
pub fn admission(
    sloppy: Option<Sloppy>,
    partition: Partition,
    wants: &[Want],
    books: &Books<'_>,
) -> Admission {
    let Books { held, outstanding, local } = *books;
    let waiting = !outstanding.is_empty();
    let right = |waiting, local| admit(partition, wants, held, waiting, local);
    match sloppy {
        None => right(waiting, local),
        Some(Sloppy::TwoOutstanding) => right(false, local),
        Some(Sloppy::WaitsElsewhereUntold) => right(outstanding.contains(&partition), local),
        Some(Sloppy::ForeignWaits) => right(waiting, true),
        Some(Sloppy::HeldElsewhereUntold) => {
            let here: Vec<_> = held.iter().filter(|(at, _)| *at == partition).cloned().collect();
            admit(partition, wants, &here, waiting, local)
        }
        Some(Sloppy::Mixed) => match right(waiting, local) {
            Admission::Split { new, .. } => match admit(partition, &new, held, waiting, local) {
                Admission::Ask { retry, .. } => addition(Standing::Incremental, false, retry),
                other => other,
            },
            other => other,
        },
        Some(Sloppy::UpgradeAsks) => match right(waiting, local) {
            Admission::Upgrade(_) => addition(Standing::Fresh, true, false),
            other => other,
        },
        Some(Sloppy::TwoOrders | Sloppy::UnsortedRetry | Sloppy::AdditionQueues) => {
            spoil_addition(sloppy, wants, held, right(waiting, local))
        }
    }
}

/// Spoils the answer about new keys of an owner that may not stand in line.
fn spoil_addition(
    sloppy: Option<Sloppy>,
    wants: &[Want],
    held: &[(Partition, Want)],
    answer: Admission,
) -> Admission {
    let is_new = |want: &Want| !held.iter().any(|(_, have)| have.key == want.key);
    match answer {
        Admission::Ask { standing, queue: false, .. } if wants.iter().all(is_new) => match sloppy {
            Some(Sloppy::TwoOrders) => {
                let above = held.iter().all(|(_, have)| have.key < wants[0].key);
                addition(standing, false, above)
            }
            Some(Sloppy::UnsortedRetry) => addition(standing, false, true),
            _ => addition(standing, true, false),
        },
        other => other,
    }
}

fn addition(standing: Standing, queue: bool, retry: bool) -> Admission {
    Admission::Ask { standing, queue, retry }
}
