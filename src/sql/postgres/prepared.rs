//! Statements that a session keeps, and how they are called in a message with others.
//!
//! One message of the simple protocol carries many statements, so a branch begins and is fenced in
//! one round trip; but it has no parameters. `PREPARE` and `EXECUTE` bring them back, and a plan
//! that is made once. Values are written as literals, and the only ones that programs choose, the
//! keys, in a form that means the same under every setting of a session.
//!
//! A session that lacks the statements answers [`LACKING`]: it is new, or another one behind a
//! pooler, or a program has sent `DEALLOCATE ALL`. Whoever hears that sends [`Prepared::prepare`],
//! and what failed once more. No client has to remember which of its sessions has what.

use std::fmt::Write;
use std::hash::{DefaultHasher, Hasher};

use uuid::Uuid;

use super::{PROVE, bare, prove};

/// What a session answers that lacks a prepared statement.
pub(crate) const LACKING: &str = "26000";

/// The statements of one version of the fence.
///
/// Their names hold a hash of the text, so that versions of palisade that share the sessions of a
/// pooler never run the statements of each other.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prepared {
    fence: &'static str,
    mark: u64,
}

/// The values of the fence statement, in the order of its parameters.
#[derive(Debug)]
pub(crate) struct Shown<'k> {
    /// Key, whether it is held exclusively, token.
    pub(crate) held: Vec<(&'k str, bool, i64)>,
    pub(crate) owner: Uuid,
    pub(crate) attempt: Option<Uuid>,
    /// `lock_timeout` and `statement_timeout` of what follows, in milliseconds.
    pub(crate) limits: [String; 2],
}

impl Prepared {
    /// The statements with this text of the fence.
    pub(crate) fn of(fence: &'static str) -> Self {
        let mut mark = DefaultHasher::new();
        mark.write(fence.as_bytes());
        mark.write(PROVE.as_bytes());
        Self { fence, mark: mark.finish() }
    }

    /// Ends a failed transaction and prepares the statements, in a transaction of their own: within
    /// one message, they would otherwise become the first statements of the one that follows.
    pub(crate) fn prepare(self) -> String {
        let (mark, fence) = (self.mark, bare(self.fence));
        let prove = prove("pg_current_xact_id_if_assigned() = $1");
        format!(
            "ROLLBACK; BEGIN; \
             PREPARE palisade_fence_{mark:016x} \
             (text[], boolean[], bigint[], uuid, uuid, text, text) AS {fence}; \
             PREPARE palisade_prove_{mark:016x} (xid8) AS {prove} COMMIT; "
        )
    }

    /// Shows tokens to fence rows.
    pub(crate) fn fence(self, shown: &Shown<'_>) -> String {
        let mut sql = format!("EXECUTE palisade_fence_{:016x} (ARRAY[", self.mark);
        let comma = |place| if place == 0 { "" } else { "," };
        for (place, (key, _, _)) in shown.held.iter().enumerate() {
            sql += comma(place);
            quote(&mut sql, key);
        }
        sql += "], '{";
        for (place, (_, exclusive, _)) in shown.held.iter().enumerate() {
            let _ = write!(sql, "{}{exclusive}", comma(place));
        }
        sql += "}', '{";
        for (place, (_, _, token)) in shown.held.iter().enumerate() {
            let _ = write!(sql, "{}{token}", comma(place));
        }
        let (owner, [lock, statement]) = (shown.owner, &shown.limits);
        let _ = match shown.attempt {
            Some(attempt) => write!(sql, "}}', '{owner}', '{attempt}', "),
            None => write!(sql, "}}', '{owner}', NULL, "),
        };
        let _ = write!(sql, "'{lock}', '{statement}')");
        sql
    }

    /// Fails unless the transaction has this id.
    pub(crate) fn prove(self, transaction: u64) -> String {
        format!("EXECUTE palisade_prove_{:016x} ('{transaction}'); ", self.mark)
    }
}

/// A text as a literal.
///
/// An `E''` literal means the same whatever `standard_conforming_strings` says. The two characters
/// that could end it or escape something are written as numbers, so neither of them is in it but by
/// our own hand. A key has no NUL, which no text of PostgreSQL can hold.
fn quote(sql: &mut String, text: &str) {
    sql.push_str("E'");
    for character in text.chars() {
        match character {
            '\'' => sql.push_str("\\u0027"),
            '\\' => sql.push_str("\\u005C"),
            _ => sql.push(character),
        }
    }
    sql.push('\'');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_literal_ends_where_its_text_ends(text in "\\PC*|['\\\\u027E$]*") {
            let mut sql = String::new();
            quote(&mut sql, &text);
            let inner = sql.strip_prefix("E'").and_then(|rest| rest.strip_suffix('\'')).unwrap();
            prop_assert!(!inner.contains('\''));
            prop_assert_eq!(inner.replace("\\u0027", "'").replace("\\u005C", "\\"), text);
        }
    }

    #[test]
    fn another_text_has_another_name() {
        let (one, other) = (Prepared::of("SELECT 1"), Prepared::of("SELECT 2"));
        assert_ne!(one.prove(7), other.prove(7));
        assert_eq!(one.prove(7), Prepared::of("SELECT 1").prove(7));
    }

    #[test]
    fn values_stand_in_the_order_of_the_parameters() {
        let held = vec![("it's", true, 7), ("b", false, 8)];
        let limits = ["10".to_owned(), "20".to_owned()];
        let shown = Shown { held, owner: Uuid::nil(), attempt: None, limits };
        let sql = Prepared::of("").fence(&shown);
        let values = sql.split_once(' ').unwrap().1.split_once(' ').unwrap().1;
        let nil = Uuid::nil();
        let expected = format!(
            "(ARRAY[E'it\\u0027s',E'b'], '{{true,false}}', '{{7,8}}', '{nil}', NULL, '10', '20')"
        );
        assert_eq!(values, expected);
    }
}
