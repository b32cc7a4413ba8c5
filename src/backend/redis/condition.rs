//! What is to be known of a server before it is used: its version, whether it may throw locks away,
//! and whether it has just forgotten some.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{RedisError, Value};

use super::failure;
use super::greeting::{Refusal, ask, text};
use super::options::RedisOptions;
use super::request;
use crate::error::{Error, ErrorKind};
use crate::types::Partition;

const OPERATION: &str = "connect";

/// Where the life of the server is kept that was seen last.
const LIFE: &str = "palisade:life";

/// What stands in the place of a token counter while nothing is to be granted.
pub(super) const QUIET: &str = "quiet";

/// Sent once a connection, so with its text.
const REMEMBER_LIFE: &str =
    concat!("#!lua flags=allow-oom\n", include_str!("lua/remember_life.lua"));

/// What the server says of itself.
struct Condition(String);

/// Refuses a server that is too old, warns of one that may evict locks, and keeps one quiet that
/// may have forgotten some.
pub(super) async fn check(
    connection: &mut MultiplexedConnection,
    options: &RedisOptions,
) -> Result<(), Refusal> {
    let Some(condition) = Condition::ask(connection).await? else {
        return match options.amnesia_guard {
            // A user that may not ask is not told of the rest.
            None => Ok(()),
            Some(_) => Err(Refusal::Final(failure::unknown_life())),
        };
    };
    if condition.major().is_some_and(|major| major < 7) {
        return Err(Refusal::Final(failure::too_old()));
    }
    condition.warn();
    match options.amnesia_guard {
        None => Ok(()),
        Some(guard) => condition.keep_quiet(connection, options.partitions, guard).await,
    }
}

impl Condition {
    /// Nothing if the user may not ask.
    async fn ask(connection: &mut MultiplexedConnection) -> Result<Option<Self>, RedisError> {
        match ask(connection, &redis::cmd("INFO")).await {
            Ok(value) => Ok(text(value).map(Self)),
            Err(error) if error.code() == Some("NOPERM") => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn field(&self, name: &str) -> Option<&str> {
        self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
    }

    fn major(&self) -> Option<u32> {
        self.field("redis_version")?.split('.').next()?.parse().ok()
    }

    fn warn(&self) {
        let policy = self.field("maxmemory_policy").unwrap_or("noeviction");
        if policy != "noeviction" && self.field("maxmemory").is_some_and(|bytes| bytes != "0") {
            tracing::warn!(
                policy,
                "Redis may throw locks away when its memory is full: \
                 CONFIG SET maxmemory-policy noeviction"
            );
        }
    }

    /// In a life of the server that nobody has seen before, nothing is granted until all leases of
    /// an earlier one have run out.
    async fn keep_quiet(
        &self,
        connection: &mut MultiplexedConnection,
        partitions: u16,
        guard: Duration,
    ) -> Result<(), Refusal> {
        let uptime = self.field("uptime_in_seconds").and_then(|seconds| seconds.parse().ok());
        // It counts whole seconds of the clock, so it may be ahead by one.
        let guard = guard.saturating_add(Duration::from_secs(1));
        let left = guard.saturating_sub(Duration::from_secs(uptime.unwrap_or(0)));
        let life = self.field("run_id").unwrap_or_default();
        let mut remember = redis::cmd("EVAL");
        remember.arg(REMEMBER_LIFE).arg(usize::from(partitions) + 1).arg(LIFE);
        for partition in 0..partitions {
            remember.arg(request::counter(Partition(partition)));
        }
        remember.arg(life).arg(left.as_millis().to_string()).arg(QUIET);
        match ask(connection, &remember).await? {
            Value::Int(_) => Ok(()),
            _ => Err(Refusal::Final(failure::corrupt(OPERATION, LIFE))),
        }
    }
}

/// What a request is told that meets a quiet server.
pub(super) fn quiet(operation: &'static str, left: Duration) -> Error {
    let detail = format!(
        "the Redis server was started a short time ago and may have forgotten locks; it grants \
         nothing for another {left:?} (RedisOptions::amnesia_guard)"
    );
    Error::new(ErrorKind::Unavailable, operation, detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "# Server\r\nredis_version:6.2.14\r\nrun_id:ab\r\nmaxmemory_human:1\r\n";
        let condition = Condition(text.to_owned());
        assert_eq!(condition.major(), Some(6));
        assert_eq!(condition.field("run_id"), Some("ab"));
        assert_eq!(condition.field("maxmemory"), None);
    }
}
