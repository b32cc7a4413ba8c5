//! The statements for PostgreSQL.

pub(crate) mod name;
pub(crate) mod prepared;

use std::fmt::Write;
use std::sync::LazyLock;
use std::time::Duration;

use uuid::Uuid;

use super::File;

/// See the file.
pub(crate) const FENCE: &str = include_str!("postgres/fence.sql");
/// See the file.
pub(crate) const STORE_FENCE: &str = include_str!("postgres/store_fence.sql");
/// See the file.
pub(crate) const LOOK: &str = include_str!("postgres/look.sql");
/// See the file.
pub(crate) const TOKENS: &str = include_str!("postgres/tokens.sql");
/// See the file.
pub(crate) const CONTACT: &str = include_str!("postgres/contact.sql");
/// See the file.
pub(crate) const PUBLISH_MORE: &str = include_str!("postgres/publish_more.sql");
/// See the file.
pub(crate) const END_SESSION: &str = include_str!("postgres/end_session.sql");
/// See the file.
pub(crate) const PURGE: &str = include_str!("postgres/purge.sql");
/// See the file.
pub(crate) const PURGE_SESSIONS: &str = include_str!("postgres/purge_sessions.sql");
/// See the file.
pub(crate) const WATERMARK: &str = include_str!("postgres/watermark.sql");
/// See the file.
pub(crate) const WATERMARK_SEEN: &str = include_str!("postgres/watermark_seen.sql");

// These are sent whole each time, so their headers stay here.
static PUBLISH: Bare = LazyLock::new(|| bare(include_str!("postgres/publish.sql")));
static BEGIN: Bare = LazyLock::new(|| bare(include_str!("postgres/begin.sql")));
static BEGIN_READ: Bare = LazyLock::new(|| bare(include_str!("postgres/begin_read.sql")));
static PROVE: Bare = LazyLock::new(|| bare(include_str!("postgres/prove.sql")));

type Bare = LazyLock<String>;

fn bare(sql: &str) -> String {
    sql.lines()
        .filter(|line| !line.starts_with("--"))
        .fold(String::new(), |out, line| out + line + "\n")
}

/// How long a client may at least take no byte of an answer: a network that drops packets for a
/// moment is no reason to end its session.
const LEAST_UNREAD: Duration = Duration::from_secs(5);

/// What creates the tables.
pub(crate) const MIGRATIONS: &[File] = &[File {
    version: 1,
    name: "fence",
    sql: include_str!("../../migrations/postgres/0001_fence.sql"),
}];

/// What is published about a branch, ready to stand in a statement.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) attempt: Uuid,
    pub(crate) owner: Uuid,
    /// Keys in hex, with modes and tokens.
    pub(crate) keys: Vec<(String, bool, i64)>,
}

/// A key in hex, which no statement has to quote.
pub(crate) fn hex(key: &str) -> String {
    key.bytes().fold(String::with_capacity(key.len() * 2), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// The key that [`hex`] was made of.
pub(crate) fn unhex(hex: &str) -> Option<String> {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    let bytes: Option<Vec<u8>> = hex.as_bytes().chunks(2).map(byte).collect();
    String::from_utf8(bytes?).ok()
}

/// `publish.sql` with its values.
pub(crate) fn publish(branch: &Published) -> String {
    let list = |items: Vec<String>| format!("{{{}}}", items.join(","));
    let resources = branch.keys.iter().map(|(hex, _, _)| hex.clone()).collect();
    let exclusive = branch.keys.iter().map(|(_, exclusive, _)| exclusive.to_string()).collect();
    let tokens = branch.keys.iter().map(|(_, _, token)| token.to_string()).collect();
    PUBLISH
        .replace("{attempt}", &branch.attempt.to_string())
        .replace("{owner}", &branch.owner.to_string())
        .replace("{resources}", &list(resources))
        .replace("{exclusive}", &list(exclusive))
        .replace("{tokens}", &list(tokens))
}

/// `begin.sql` with its values.
pub(crate) fn begin(
    name: &str,
    isolation: &'static str,
    lock: Duration,
    fence: Duration,
    lease: Duration,
) -> String {
    BEGIN
        .replace("{isolation}", isolation)
        .replace("{name}", name)
        .replace("{lock_ms}", &millis(lock))
        .replace("{fence_ms}", &millis(fence))
        .replace("{lease_ms}", &millis(lease))
        .replace("{unread_ms}", &millis(lease.max(LEAST_UNREAD)))
}

/// Starts the savepoint in which keys are added to an open branch, under the limits of a fence.
pub(crate) fn savepoint(lock: Duration, fence: Duration) -> String {
    format!(
        "SAVEPOINT palisade_extend; SET LOCAL lock_timeout = {}; \
         SET LOCAL statement_timeout = {}; ",
        millis(lock),
        millis(fence)
    )
}

/// `begin_read.sql` with its values.
pub(crate) fn begin_read(attempt: Uuid, statement: Duration, lease: Duration) -> String {
    BEGIN_READ
        .replace("{attempt}", &attempt.to_string())
        .replace("{statement_ms}", &millis(statement))
        .replace("{lease_ms}", &millis(lease))
}

/// Fails unless this is the snapshot of a branch that reads.
pub(crate) fn prove_read(attempt: Uuid) -> String {
    let truth = format!(
        "current_setting('application_name') = 'palisade-read:{attempt}' \
         AND current_setting('transaction_read_only') = 'on'"
    );
    prove(&truth)
}

/// `prove.sql` with the condition.
fn prove(truth: &str) -> String {
    PROVE.replace("{truth}", truth)
}

/// What a proof says when it fails.
pub(crate) const NOT_PROVEN: &str = "palisade: not the fenced transaction";

/// A duration as a server setting: whole milliseconds, at least one, because 0 means for ever.
pub(crate) fn millis(duration: Duration) -> String {
    duration.as_millis().clamp(1, 2_147_483_647).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_in_hex_needs_no_quotes_and_comes_back() {
        for key in ["a", "it's", "ключ", "\\\"{,}"] {
            let hex = hex(key);
            assert!(hex.chars().all(|c| c.is_ascii_hexdigit()));
            assert_eq!(unhex(&hex).as_deref(), Some(key));
        }
        assert_eq!(unhex("zz"), None);
    }

    #[test]
    fn a_setting_is_never_zero_which_would_be_no_limit() {
        assert_eq!(millis(Duration::ZERO), "1");
        assert_eq!(millis(Duration::from_secs(1 << 40)), "2147483647");
    }

    #[test]
    fn no_place_is_left_open_in_a_message() {
        let published = Published {
            attempt: Uuid::nil(),
            owner: Uuid::nil(),
            keys: vec![(hex("a"), true, 7), (hex("b"), false, 8)],
        };
        let second = Duration::from_secs(1);
        let message = publish(&published) + &begin("name", "", second, second, second);
        assert!(message.contains("'{61,62}', '{true,false}', '{7,8}'"), "{message}");
        let message = message + &begin_read(Uuid::nil(), second, second);
        let prepared = prepared::Prepared::of(FENCE);
        let message = message + &prepared.prepare() + &prepared.prove(7);
        assert!(!message.contains("--") && !message.contains("_ms}"), "{message}");
        assert!(!message.contains("{a") && !message.contains("{i"), "{message}");
    }
}
