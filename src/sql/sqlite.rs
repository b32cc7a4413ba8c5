//! The statements for SQLite.

use std::fmt::Write;

use super::File;

/// See the file.
pub(crate) const FENCE: &str = include_str!("sqlite/fence.sql");
/// See the file.
pub(crate) const STORE_FENCE: &str = include_str!("sqlite/store_fence.sql");
/// See the file.
pub(crate) const LOOK: &str = include_str!("sqlite/look.sql");
/// See the file.
pub(crate) const TOKENS: &str = include_str!("sqlite/tokens.sql");
/// See the file.
pub(crate) const PURGE: &str = include_str!("sqlite/purge.sql");
/// See the file.
pub(crate) const WATERMARK: &str = include_str!("sqlite/watermark.sql");

/// What creates the tables.
pub(crate) const MIGRATIONS: &[File] = &[File {
    version: 1,
    name: "fence",
    sql: include_str!("../../migrations/sqlite/0001_fence.sql"),
}];

/// Keys, modes and tokens as the JSON array that the statements take.
///
/// Written by hand: a list of texts and numbers is not worth a dependency.
pub(crate) fn json<'k>(keys: impl Iterator<Item = (&'k str, bool, u64)>) -> String {
    let mut out = String::from("[");
    for (key, exclusive, token) in keys {
        if out.len() > 1 {
            out.push(',');
        }
        out.push_str("[\"");
        for c in key.chars() {
            match c {
                '"' | '\\' => out.extend(['\\', c]),
                c if u32::from(c) < 0x20 => {
                    let _ = write!(out, "\\u{:04x}", u32::from(c));
                }
                c => out.push(c),
            }
        }
        let _ = write!(out, "\",{},{token}]", u8::from(exclusive));
    }
    out.push(']');
    out
}

#[cfg(test)]
mod tests {
    use super::json;

    #[test]
    fn keys_of_any_kind_become_json() {
        let keys = [("plain", true, 7), ("q\"b\\n\n", false, 9)];
        assert_eq!(json(keys.into_iter()), r#"[["plain",1,7],["q\"b\\n\u000a",0,9]]"#);
        assert_eq!(json(std::iter::empty()), "[]");
    }
}
