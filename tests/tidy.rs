//! What `cargo` does not check: who imports whom, how long things are, what the docs must say.
//!
//! The files are read as text. Every check has a test beside it that plants what it must find.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    unreachable_pub,
    reason = "a test panics to fail, and nobody imports it"
)]

#[path = "tidy/floors.rs"]
mod floors;
#[path = "tidy/rules.rs"]
mod rules;
#[path = "tidy/source.rs"]
mod source;

use source::{Source, files, read};

/// The house. An import goes to a lower floor; rooms on one floor do not know each other.
const FLOORS: &[(u8, &[&str])] = &[
    (7, &["lib", "connect"]),
    (6, &["transaction"]),
    (5, &["lock", "layer", "testing"]),
    (4, &["backend", "store"]),
    (3, &["sql"]),
    (2, &["error", "protocol"]),
    (1, &["types"]),
];

/// The suites are about the other rooms of their floor.
const SEES_ITS_FLOOR: &[&str] = &["testing"];

/// The drivers of each seam. They never see each other, and only `connect` names them from outside.
const DRIVERS: &[(&str, &[&str])] = &[
    ("backend", &["memory", "redis", "etcd", "sql", "postgres", "mysql", "sqlite"]),
    ("store", &["postgres", "mysql", "sqlite"]),
];

/// Fails with the list of what was found.
fn none(found: impl IntoIterator<Item = String>) {
    let found: Vec<String> = found.into_iter().collect();
    assert!(found.is_empty(), "{} found:\n{}", found.len(), found.join("\n"));
}

/// What `check` finds in the library.
fn none_in_src(check: impl Fn(&Source) -> Vec<String>) {
    let sources = Source::all("src");
    assert!(!sources.is_empty(), "the sources are not where they should be");
    none(sources.iter().flat_map(check));
}

/// All files with one of these endings that are written by hand.
fn written(endings: &[&str]) -> Vec<String> {
    let all = ["src", "tests", "examples", "benches", "migrations"].into_iter().flat_map(files);
    all.filter(|path| endings.iter().any(|ending| path.ends_with(ending))).collect()
}

#[test]
fn every_room_has_a_floor() {
    none(floors::unknown_rooms(&Source::all("src")));
}

#[test]
fn imports_go_down_only() {
    none(floors::climbing_imports(&Source::all("src")));
}

#[test]
fn drivers_are_named_by_connect_alone() {
    none(floors::named_drivers(&Source::all("src")));
}

#[test]
fn files_are_short() {
    none_in_src(rules::long_file);
}

#[test]
fn lines_are_short() {
    let paths = written(&[".rs", ".lua", ".sql"]);
    none(paths.iter().flat_map(|path| rules::long_lines(path, &read(path))));
}

#[test]
fn functions_are_short() {
    none_in_src(|source| rules::long_functions(source, rules::FUNCTION));
    let programs: Vec<Source> = ["examples", "benches"].into_iter().flat_map(Source::all).collect();
    none(programs.iter().flat_map(|source| rules::long_functions(source, rules::FUNCTION)));
    let tests = Source::all("tests");
    none(tests.iter().flat_map(|source| rules::long_functions(source, rules::TEST_FUNCTION)));
}

#[test]
fn the_library_neither_panics_carelessly_nor_prints() {
    none_in_src(rules::careless_calls);
}

#[test]
fn public_functions_say_when_they_fail_and_what_a_drop_does() {
    none_in_src(rules::missing_sections);
}

#[test]
fn public_enums_are_open_or_say_why_not() {
    none_in_src(rules::undecided_enums);
}

#[test]
fn names_of_rooms_say_what_is_inside() {
    none(files("src").iter().filter_map(|path| rules::vague_name(path)));
}

#[test]
fn scripts_and_statements_begin_with_what_they_do() {
    let paths = written(&[".lua", ".sql"]);
    none(paths.iter().filter_map(|path| rules::missing_header(path, read)));
}

#[test]
fn no_file_names_a_path_of_one_machine() {
    none(files("").iter().flat_map(|path| rules::machine_paths(path, &read(path))));
}

#[test]
fn the_papers_are_there() {
    let papers = ["README.md", "CHANGELOG.md", "LICENSE-MIT", "LICENSE-APACHE"];
    let missing = papers.iter().filter(|path| read(path).trim().is_empty());
    none(missing.map(|path| format!("{path}:1: missing or empty")));
}
