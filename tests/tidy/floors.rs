//! Who imports whom.

use super::source::{Source, identifier, words};
use super::{DRIVERS, FLOORS, SEES_ITS_FLOOR};

/// Rooms that may name drivers from outside: one builds them, the other exports them. The public
/// suites run over all of them.
const NAME_DRIVERS: [&str; 3] = ["connect", "lib", "testing"];

/// The room that a file belongs to.
pub fn room(path: &str) -> &str {
    let path = path.strip_prefix("src/").unwrap_or(path);
    path.split_once('/').map_or(path.trim_end_matches(".rs"), |(room, _)| room)
}

pub fn floor(room: &str) -> Option<u8> {
    FLOORS.iter().find(|(_, rooms)| rooms.contains(&room)).map(|(floor, _)| *floor)
}

/// Rooms that the table does not know.
pub fn unknown_rooms(sources: &[Source]) -> Vec<String> {
    let unknown = sources.iter().filter(|source| floor(room(&source.path)).is_none());
    unknown
        .map(|source| source.report(0, &format!("the room `{}` has no floor", room(&source.path))))
        .collect()
}

/// Imports that do not go down.
pub fn climbing_imports(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources {
        let from = room(&source.path);
        for (at, path) in references(source) {
            let to = path.first().map_or("lib", String::as_str);
            if from == to || from == "lib" {
                continue;
            }
            let message = match (floor(from), floor(to)) {
                (Some(from_floor), Some(to_floor)) => {
                    let ceiling = from_floor + u8::from(SEES_ITS_FLOOR.contains(&from));
                    if to_floor < ceiling {
                        continue;
                    }
                    format!("`{from}` on floor {from_floor} imports `{to}` on floor {to_floor}")
                }
                // The room itself is reported as unknown.
                (None, _) => continue,
                _ => format!("`crate::{to}` hides its room: name it as `crate::room::{to}`"),
            };
            found.push(source.report(at, &message));
        }
    }
    found.dedup();
    found
}

/// Drivers that are named where only their seam should be.
pub fn named_drivers(sources: &[Source]) -> Vec<String> {
    let exports = exports(sources);
    let mut found = Vec::new();
    for source in sources {
        let from = module(&source.path);
        for (at, path) in references(source) {
            let [room, name, ..] = path.as_slice() else { continue };
            let Some(driver) = driver(room, name, &exports) else { continue };
            if from.first().map(String::as_str) == Some(room.as_str()) {
                let mine = from.get(1).filter(|mine| is_driver(room, mine));
                if mine.is_some_and(|mine| mine != driver) {
                    let message = format!("a driver of `{room}` imports another one, `{driver}`");
                    found.push(source.report(at, &message));
                }
            } else {
                let from = from.first().map_or("lib", String::as_str);
                if !NAME_DRIVERS.contains(&from) && !source.is_test(at) {
                    let message = format!("`{from}` names a driver, `{room}::{name}`");
                    found.push(source.report(at, &message));
                }
            }
        }
    }
    found
}

/// The driver behind a name of a room: its module, or something that the room exports from there.
fn driver<'a>(room: &str, name: &'a str, exports: &'a [Export]) -> Option<&'a str> {
    if is_driver(room, name) {
        return Some(name);
    }
    let export = exports.iter().find(|export| export.room == room && export.name == name);
    export.map(|export| export.driver)
}

fn is_driver(room: &str, name: &str) -> bool {
    DRIVERS.iter().any(|(of, drivers)| *of == room && drivers.contains(&name))
}

struct Export {
    room: &'static str,
    driver: &'static str,
    name: String,
}

/// What the rooms export from their drivers, by `pub use driver::…` in their `mod.rs`.
fn exports(sources: &[Source]) -> Vec<Export> {
    let mut found = Vec::new();
    for (room, drivers) in DRIVERS {
        let path = format!("src/{room}/mod.rs");
        let Some(source) = sources.iter().find(|source| source.path == path) else { continue };
        for driver in *drivers {
            for at in words(&source.code, driver) {
                if !source.code[..at].ends_with("use ") {
                    continue;
                }
                let mut paths = Vec::new();
                use_tree(&source.code[at..], &mut Vec::new(), &mut paths);
                let names = paths.into_iter().filter_map(|mut path| path.pop());
                found.extend(names.map(|name| Export { room, driver, name }));
            }
        }
    }
    found
}

/// The module that a file is.
fn module(path: &str) -> Vec<String> {
    let path = path.strip_prefix("src/").unwrap_or(path);
    let path = path.strip_suffix(".rs").unwrap_or(path);
    let path = path.strip_suffix("/mod").unwrap_or(path);
    if path == "lib" {
        return Vec::new();
    }
    path.split('/').map(ToOwned::to_owned).collect()
}

/// Every path that starts at the crate or relative to its module, from the root of the crate.
fn references(source: &Source) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    for start in ["crate", "super", "self"] {
        for at in words(&source.code, start) {
            let continues = source.code[..at].trim_end().ends_with("::");
            if continues || !source.code[at + start.len()..].starts_with("::") {
                continue;
            }
            let mut paths = Vec::new();
            use_tree(&source.code[at..], &mut Vec::new(), &mut paths);
            let here = module(&source.path);
            let inline = source.modules_around(at).into_iter().map(ToOwned::to_owned);
            let here: Vec<String> = here.into_iter().chain(inline).collect();
            found.extend(paths.into_iter().map(|path| (at, resolve(&here, path))));
        }
    }
    found
}

fn resolve(here: &[String], path: Vec<String>) -> Vec<String> {
    let mut resolved = here.to_vec();
    for part in path {
        match part.as_str() {
            "crate" => resolved.clear(),
            "super" => drop(resolved.pop()),
            "self" => {}
            _ => resolved.push(part),
        }
    }
    resolved
}

/// Reads a path or the tree of a `use`, and returns what is left of `code` behind it.
fn use_tree<'a>(code: &'a str, before: &mut Vec<String>, paths: &mut Vec<Vec<String>>) -> &'a str {
    let depth = before.len();
    let mut rest = code.trim_start();
    loop {
        if let Some(mut inner) = rest.strip_prefix('{') {
            loop {
                inner = inner.trim_start();
                if let Some(after) = inner.strip_prefix('}') {
                    rest = after;
                    break;
                }
                let after = use_tree(inner, before, paths).trim_start();
                let after = after.strip_prefix(',').unwrap_or(after);
                if after.len() == inner.len() {
                    // Not a tree after all.
                    rest = after;
                    break;
                }
                inner = after;
            }
            break;
        }
        let name = if rest.starts_with('*') { "*" } else { identifier(rest) };
        before.push(name.to_owned());
        rest = &rest[name.len()..];
        match rest.strip_prefix("::") {
            Some(after) if after.trim_start().starts_with(|c: char| c != '<') => {
                rest = after.trim_start();
            }
            _ => {
                paths.push(before.clone());
                if let Some(alias) = rest.trim_start().strip_prefix("as ") {
                    let alias = alias.trim_start();
                    rest = &alias[identifier(alias).len()..];
                }
                break;
            }
        }
    }
    before.truncate(depth);
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn climbing(path: &str, text: &str) -> Vec<String> {
        climbing_imports(&[Source::parse(path, text)])
    }

    #[test]
    fn an_import_that_climbs_is_found_however_it_is_written() {
        for text in [
            "use crate::transaction::Coordinator;",
            "use crate::{error::Error, transaction::{self as t, Coordinator}};",
            "use super::super::transaction::Coordinator;",
            "fn f() { crate::transaction::go::<u8>() }",
            "fn f() -> Option<crate::transaction::T> { None }",
            "#[cfg(test)] mod tests { use super::super::super::transaction::T; }",
        ] {
            let found = climbing("src/lock/guard.rs", text);
            assert_eq!(
                found,
                ["src/lock/guard.rs:1: `lock` on floor 5 imports `transaction` on floor 6"],
                "{text}"
            );
        }
    }

    #[test]
    fn rooms_on_one_floor_are_strangers_save_for_testing() {
        assert_eq!(climbing("src/lock/mod.rs", "use crate::layer::Quorum;").len(), 1);
        assert_eq!(climbing("src/testing/mod.rs", "use crate::layer::Quorum;").len(), 0);
        assert_eq!(climbing("src/testing/mod.rs", "use crate::transaction::T;").len(), 1);
        assert_eq!(climbing("src/layer/mod.rs", "use crate::testing::Seed;").len(), 1);
    }

    #[test]
    fn imports_down_and_within_a_room_are_fine() {
        let text = "use crate::{error::Error, types};\nuse super::queue;\nuse crate::lock::queue;\n\
                    // crate::transaction\nconst A: &str = \"crate::transaction::B\";\n\
                    #[cfg(test)] mod tests { use super::*; }";
        assert_eq!(climbing("src/lock/guard.rs", text), [""; 0]);
        assert_eq!(climbing("src/lib.rs", "pub use crate::transaction::T;"), [""; 0]);
    }

    #[test]
    fn a_name_of_the_crate_root_hides_its_room() {
        let found = climbing("src/lock/mod.rs", "fn f() -> crate::Error {}");
        assert_eq!(
            found,
            ["src/lock/mod.rs:1: `crate::Error` hides its room: name it as `crate::room::Error`"]
        );
    }

    #[test]
    fn a_room_without_a_floor_is_found() {
        let sources =
            [Source::parse("src/attic/mod.rs", ""), Source::parse("src/types/key.rs", "")];
        assert_eq!(unknown_rooms(&sources), ["src/attic/mod.rs:1: the room `attic` has no floor"]);
    }

    #[test]
    fn a_driver_named_from_above_or_from_beside_is_found() {
        let backend = || Source::parse("src/backend/mod.rs", "pub use redis::{RedisBackend, Url};");
        for (path, text, expected) in [
            ("src/lock/mod.rs", "use crate::backend::redis::X;", "names a driver"),
            ("src/transaction/mod.rs", "use crate::backend::{LockBackend, Url};", "names a driver"),
            ("src/backend/memory.rs", "use super::redis::X;", "imports another one"),
            ("src/backend/memory.rs", "use super::{Url};", "imports another one"),
            ("src/store/sqlite/mod.rs", "use crate::store::postgres::X;", "imports another one"),
        ] {
            let found = named_drivers(&[backend(), Source::parse(path, text)]);
            assert_eq!(found.len(), 1, "{text}");
            assert!(found[0].contains(expected), "{found:?}");
        }
        for (path, text) in [
            ("src/connect.rs", "use crate::backend::redis::X;"),
            ("src/backend/redis/script.rs", "use super::X; use crate::backend::redis::Y;"),
            ("src/backend/mod.rs", "pub use self::redis::X;"),
            ("src/lock/mod.rs", "use crate::backend::LockBackend;"),
            ("src/lock/mod.rs", "#[cfg(test)] mod tests { use crate::backend::redis::X; }"),
        ] {
            let found = named_drivers(&[backend(), Source::parse(path, text)]);
            assert_eq!(found, [""; 0], "{text}");
        }
    }
}
