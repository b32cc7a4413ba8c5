//! Each planted bug is caught by its scenario, and the scenario passes without it.

use palisade::backend::LockBackend;
use palisade::protocol::Released;
use palisade::testing::{Edit, planted_redis};
use palisade::{ErrorKind, Mode};

use crate::planted::{BUGS, Backend, Bug, meaningless, run};
use crate::redis_asks::{Client, connect, tokens};
use crate::support::RedisServer;

async fn is_caught(bug: &str, backend: Backend) {
    let finding = run(Bug::named(bug), backend).await.expect("the bug can be there");
    println!("{bug} on {}: {}", finding.backend, finding.evidence);
    assert!(finding.clean, "refused without the bug: {}", finding.evidence);
    assert!(finding.caught, "not caught: {}", finding.evidence);
}

/// A test for each, so that they run side by side, and the list of those that have one.
macro_rules! bugs {
    ($backend:expr; $($bug:literal => $test:ident,)+) => {
        use super::*;

        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $test() {
                is_caught($bug, $backend).await;
            }
        )+

        #[test]
        fn every_bug_has_a_test_or_a_reason_why_it_cannot_be_there() {
            let mut known: Vec<_> = meaningless($backend).iter().map(|(bug, _)| *bug).collect();
            known.extend([$($bug),+]);
            known.sort_unstable();
            let mut listed: Vec<_> = BUGS.iter().map(|bug| bug.name).collect();
            listed.sort_unstable();
            assert_eq!(known, listed);
        }
    };
}

mod on_redis_and_postgres {
    bugs! { Backend::RedisPostgres;
        "no fence" => a_missing_fence_is_caught,
        "SELECT fence" => a_fence_that_only_reads_is_caught,
        "FOR SHARE fence" => a_fence_that_many_can_hold_is_caught,
        "read before fence" => a_read_before_the_fence_is_caught,
        "token >= without owner" => a_fence_that_compares_tokens_alone_is_caught,
        "fence skipped without the lock service" => a_fence_that_only_locks_need_is_caught,
        "release without owner" => a_release_of_anybodys_key_is_caught,
        "renew without owner" => a_renewal_of_anybodys_key_is_caught,
        "SET then PEXPIRE" => a_lease_that_is_set_later_is_caught,
        "no request id" => a_count_that_a_copy_raises_is_caught,
    }
}

mod on_memory_and_sqlite {
    bugs! { Backend::MemorySqlite;
        "no fence" => a_missing_fence_is_caught,
        "SELECT fence" => a_fence_that_only_reads_is_caught,
        "token >= without owner" => a_fence_that_compares_tokens_alone_is_caught,
        "fence skipped without the lock service" => a_fence_that_only_locks_need_is_caught,
        "release without owner" => a_release_of_anybodys_key_is_caught,
        "renew without owner" => a_renewal_of_anybodys_key_is_caught,
        "no request id" => a_count_that_a_copy_raises_is_caught,
    }
}

const TAKES_ALL: Edit = Edit {
    of: "release",
    fragment: "local mine = true\n",
    instead: "local mine = true\nif mine then return call('DEL', unpack(KEYS)) end\n",
};

#[tokio::test]
async fn a_bug_is_in_one_backend_and_not_in_the_next() {
    let server = RedisServer::start();
    let planted = planted_redis(&server.url(), &[TAKES_ALL]).await.unwrap();
    let healthy = connect(&server).await;
    let client = Client::of(&healthy).await;
    let key = [("k", Mode::Exclusive)];
    let (holder, other) = (client.ask(&key), client.ask(&key));
    tokens(&healthy.acquire(&holder).await.unwrap());
    assert_eq!(healthy.release(&other.part).await.unwrap(), Released::Gone);
    assert_eq!(server.command(&["EXISTS", "palisade:{0}:k:k"]), "1");
    planted.release(&other.part).await.unwrap();
    assert_eq!(server.command(&["EXISTS", "palisade:{0}:k:k"]), "0");
}

#[tokio::test]
async fn a_bug_that_cannot_be_planted_is_an_error() {
    let server = RedisServer::start();
    let nowhere = [
        Edit { of: "fence", ..TAKES_ALL },
        Edit { fragment: "no such fragment", ..TAKES_ALL },
        Edit { fragment: "call(", ..TAKES_ALL },
    ];
    for edit in nowhere {
        let error = planted_redis(&server.url(), &[edit]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misuse, "{edit:?}");
    }
}
