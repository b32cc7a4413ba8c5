//! The list: what is planted where, and the scenario that must find it.

use palisade::testing::Edit;

use super::counter::Counter;
use super::edits::{postgres, redis, sqlite};
use super::service::Service;
use super::stores::Loss;
use super::{Backend, Verdict, locks, memory, stores};

use Case::{Meaningless, Planted};
use Scenario::{CutOff, FailureInAcquire, LateRelease, LateRenewal, LostReply, Overlap, Overtaken};

/// A bug, and what it is on each backend.
#[derive(Clone, Copy, Debug)]
pub struct Bug {
    pub name: &'static str,
    redis_postgres: Case,
    memory_sqlite: Case,
}

#[derive(Clone, Copy, Debug)]
pub enum Case {
    Planted(Scenario, Plant),
    /// There is no such bug there, and why.
    Meaningless(&'static str),
}

/// Where a bug is.
#[derive(Clone, Copy, Debug)]
pub enum Plant {
    Nowhere,
    /// In the scripts of the Redis driver.
    Scripts(&'static [Edit]),
    /// In front of the memory service.
    Memory(memory::Bug),
    /// In the statement that fences a branch.
    Fence(&'static [Edit]),
    /// A branch is fenced right before it commits.
    FenceAtCommit,
}

#[derive(Clone, Copy, Debug)]
pub enum Scenario {
    LateRelease,
    LateRenewal,
    FailureInAcquire,
    LostReply,
    Overtaken(Loss),
    Overlap,
    CutOff,
}

pub const BUGS: [Bug; 10] = [
    Bug {
        name: "no fence",
        redis_postgres: Planted(Overtaken(Loss::Lease), Plant::Fence(&postgres::NO_FENCE)),
        memory_sqlite: Planted(Overtaken(Loss::Lease), Plant::Fence(&sqlite::NO_FENCE)),
    },
    Bug {
        name: "SELECT fence",
        redis_postgres: Planted(Overlap, Plant::Fence(&postgres::SELECT)),
        // One branch at a time has the file, so all that is missing is the token left behind.
        memory_sqlite: Planted(Overtaken(Loss::Lease), Plant::Fence(&sqlite::SELECT)),
    },
    Bug {
        name: "FOR SHARE fence",
        redis_postgres: Planted(Overlap, Plant::Fence(&postgres::FOR_SHARE)),
        memory_sqlite: Meaningless("SQLite locks the file, and has no FOR SHARE"),
    },
    Bug {
        name: "read before fence",
        redis_postgres: Planted(Overlap, Plant::FenceAtCommit),
        memory_sqlite: Meaningless(
            "BEGIN IMMEDIATE locks the file before the first read, so nobody can write between \
             that and a fence that comes later",
        ),
    },
    Bug {
        name: "token >= without owner",
        redis_postgres: Planted(Overtaken(Loss::Memory), Plant::Fence(&postgres::WITHOUT_OWNER)),
        memory_sqlite: Planted(Overtaken(Loss::Memory), Plant::Fence(&sqlite::WITHOUT_OWNER)),
    },
    Bug {
        name: "fence skipped without the lock service",
        redis_postgres: Planted(CutOff, Plant::Fence(&postgres::NO_STORE_FENCE)),
        memory_sqlite: Planted(CutOff, Plant::Fence(&sqlite::NO_STORE_FENCE)),
    },
    Bug {
        name: "release without owner",
        redis_postgres: Planted(LateRelease, Plant::Scripts(&redis::RELEASE_WITHOUT_OWNER)),
        memory_sqlite: Planted(LateRelease, Plant::Memory(memory::Bug::ReleaseWithoutOwner)),
    },
    Bug {
        name: "renew without owner",
        redis_postgres: Planted(LateRenewal, Plant::Scripts(&redis::RENEW_WITHOUT_OWNER)),
        memory_sqlite: Planted(LateRenewal, Plant::Memory(memory::Bug::RenewWithoutOwner)),
    },
    Bug {
        name: "SET then PEXPIRE",
        redis_postgres: Planted(FailureInAcquire, Plant::Scripts(&redis::SET_THEN_PEXPIRE)),
        memory_sqlite: Meaningless("in memory, a grant and its deadline are one value"),
    },
    Bug {
        name: "no request id",
        redis_postgres: Planted(LostReply, Plant::Scripts(&redis::NO_REQUEST_ID)),
        memory_sqlite: Planted(LostReply, Plant::Memory(memory::Bug::NoRequestId)),
    },
];

impl Bug {
    /// The bug called `name`.
    ///
    /// # Panics
    /// When there is none.
    pub fn named(name: &str) -> Self {
        BUGS.into_iter().find(|bug| bug.name == name).expect("a bug of the list")
    }

    pub fn on(self, backend: Backend) -> Case {
        match backend {
            Backend::RedisPostgres => self.redis_postgres,
            Backend::MemorySqlite => self.memory_sqlite,
        }
    }
}

impl Scenario {
    pub async fn run(self, backend: Backend, plant: Plant) -> Verdict {
        let service = Service::start(backend, plant).await;
        match self {
            LateRelease => locks::late_release(&service).await,
            LateRenewal => locks::late_renewal(&service).await,
            FailureInAcquire => locks::failure_in_acquire(&service).await,
            LostReply => locks::lost_reply(&service).await,
            Overtaken(loss) => {
                let counter = Counter::start(backend, plant).await;
                stores::overtaken(&service, counter, loss).await
            }
            Overlap => {
                let counter = Counter::start(backend, plant).await;
                stores::overlap(&service, counter).await
            }
            CutOff => {
                let counter = Counter::start(backend, plant).await;
                stores::cut_off(&service, counter).await
            }
        }
    }
}
