//! Sizes, words and documentation.

use super::source::{Source, identifier, words};

/// The longest file in `src`, in lines of code.
pub const FILE: usize = 400;
/// The longest line, in characters.
pub const LINE: usize = 100;
/// The longest function of the library and the examples, and of the tests.
pub const FUNCTION: usize = 70;
pub const TEST_FUNCTION: usize = 100;

pub fn long_file(source: &Source) -> Vec<String> {
    let lines = source.code_lines();
    let message = format!("{lines} lines of code, {FILE} are allowed");
    if lines > FILE { vec![source.report(0, &message)] } else { Vec::new() }
}

pub fn long_lines(path: &str, text: &str) -> Vec<String> {
    let long = text.lines().enumerate().filter(|(_, line)| line.chars().count() > LINE);
    long.map(|(number, line)| {
        let length = line.chars().count();
        format!("{path}:{}: {length} characters, {LINE} are allowed", number + 1)
    })
    .collect()
}

pub fn long_functions(source: &Source, outside_tests: usize) -> Vec<String> {
    let mut found = Vec::new();
    for function in source.functions() {
        let allowed = if source.is_test(function.at) { TEST_FUNCTION } else { outside_tests };
        if function.lines > allowed {
            let message =
                format!("`{}` has {} lines, {allowed} are allowed", function.name, function.lines);
            found.push(source.report(function.at, &message));
        }
    }
    found
}

/// What may stand in tests and in examples of the documentation only.
pub fn careless_calls(source: &Source) -> Vec<String> {
    let mut found = Vec::new();
    let macros = ["todo!", "unimplemented!", "dbg!", "println!", "print!", "eprintln!", "eprint!"];
    for call in macros.into_iter().chain([".unwrap()", ".unwrap_err()"]) {
        for at in source.outside_tests(call) {
            let longer = source.code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
            if call.starts_with('.') || !longer {
                found.push(source.report(at, &format!("`{call}` in the library")));
            }
        }
    }
    for at in source.outside_tests(".expect(") {
        let start = source.text[..at].rmatch_indices('\n').nth(10).map_or(0, |(start, _)| start);
        if !source.text[start..at].contains("expect_used") {
            let message = "`expect` without an `allow(clippy::expect_used)` near it, which says \
                           why it cannot fail";
            found.push(source.report(at, message));
        }
    }
    found
}

/// Public functions whose documentation leaves out when they fail or what a drop does.
pub fn missing_sections(source: &Source) -> Vec<String> {
    let mut found = Vec::new();
    for function in source.functions() {
        let attributes = &source.text[function.above.clone()];
        let public = function.qualifiers.split_whitespace().next() == Some("pub");
        if !public || attributes.contains("doc(hidden)") || source.is_test(function.at) {
            continue;
        }
        let docs = &source.comments[function.above.clone()];
        let waits = function.qualifiers.contains("async")
            || function.returns.starts_with("impl Future")
            || function.returns.contains("BoxFuture<");
        let sections = [(waits, "# Cancel safety"), (is_result(function.returns), "# Errors")];
        for (needed, section) in sections {
            if needed && !docs.contains(section) {
                let message = format!("the docs of `{}` have no `{section}`", function.name);
                found.push(source.report(function.at, &message));
            }
        }
    }
    found
}

fn is_result(returned: &str) -> bool {
    let returned = returned.rsplit("Output =").next().unwrap_or(returned);
    let path = returned.split('<').next().unwrap_or_default();
    path.trim().rsplit("::").next() == Some("Result")
}

/// Public enums that a user may match in full without anyone having decided so.
pub fn undecided_enums(source: &Source) -> Vec<String> {
    let mut found = Vec::new();
    for at in words(&source.code, "enum") {
        let above = source.above(at);
        let public = source.code[above.end..at].trim() == "pub";
        let decided = source.code[above.clone()].contains("#[non_exhaustive]")
            || source.comments[above].contains("exhaustive:");
        if public && !decided && !source.is_test(at) {
            let name = identifier(source.code[at + 4..].trim_start());
            let message = format!(
                "`{name}` is neither `#[non_exhaustive]` nor has a comment `exhaustive: why`"
            );
            found.push(source.report(at, &message));
        }
    }
    found
}

/// Rooms and files that are named for nothing in particular.
pub fn vague_name(path: &str) -> Option<String> {
    const VAGUE: [&str; 9] =
        ["util", "utils", "helper", "helpers", "common", "manager", "misc", "shared", "base"];
    let vague = path.split('/').map(|part| part.split('.').next().unwrap_or(part));
    let vague = vague.into_iter().find(|part| VAGUE.contains(part))?;
    Some(format!("{path}:1: `{vague}` says nothing about what is inside"))
}

/// A script or a statement whose file does not begin by saying what it does. A piece of a script
/// may name another file beside it that says the rest; `read` gives the text of a file.
pub fn missing_header(path: &str, read: impl Fn(&str) -> String) -> Option<String> {
    let text = header(&read(path));
    if text.trim_matches(['-', ' ', '\n']).is_empty() {
        return Some(format!("{path}:1: no header comment"));
    }
    let missing = missing_in_script(&text);
    if !path.ends_with(".lua") || missing.is_empty() {
        return None;
    }
    let mut names = text.split(|c: char| !(c.is_alphanumeric() || "_.".contains(c)));
    let explained = names.any(|name| {
        let name = name.trim_end_matches('.');
        let beside =
            path.rsplit_once('/').map_or(name.to_owned(), |(at, _)| format!("{at}/{name}"));
        name.ends_with(".lua") && missing_in_script(&header(&read(&beside))).is_empty()
    });
    let message = format!("{path}:1: the header does not mention {}", missing.join(", "));
    (!explained).then_some(message)
}

fn header(text: &str) -> String {
    let lines: Vec<&str> = text.lines().take_while(|line| line.starts_with("--")).collect();
    lines.join("\n")
}

fn missing_in_script(header: &str) -> Vec<&'static str> {
    let returns = header.contains("Returns") || header.contains("returns");
    let required = [
        ("KEYS", header.contains("KEYS")),
        ("ARGV", header.contains("ARGV")),
        ("Returns", returns),
    ];
    required.into_iter().filter(|(_, there)| !there).map(|(word, _)| word).collect()
}

/// Absolute paths that exist on one machine only.
pub fn machine_paths(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for directory in ["work", "root", "tmp"] {
        // Put together here, so that this file does not contain what it looks for.
        let start = format!("/{directory}/");
        for (at, _) in text.match_indices(&start) {
            let relative =
                text[..at].ends_with(|c: char| c.is_alphanumeric() || "._-~".contains(c));
            let named = text[at + start.len()..].starts_with(|c: char| c.is_ascii_alphabetic());
            if named && !relative {
                let line = text[..at].matches('\n').count() + 1;
                found.push(format!("{path}:{line}: a path of one machine, under {start}"));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(text: &str) -> Source {
        Source::parse("src/x.rs", text)
    }

    #[test]
    fn only_lines_of_code_count_for_a_file() {
        let text = "let a = 1;\n".repeat(FILE);
        let around =
            format!("//! Docs.\n\n{text}#[cfg(test)]\nmod tests {{\n    fn a() {{}}\n}}\n");
        assert_eq!(long_file(&source(&around)), [""; 0]);
        let found = long_file(&source(&format!("{text}let b = 2;\n")));
        assert_eq!(found, ["src/x.rs:1: 401 lines of code, 400 are allowed"]);
    }

    #[test]
    fn a_long_line_is_found() {
        let text = format!("\n{}\n{}\n", "é".repeat(LINE), "é".repeat(LINE + 1));
        assert_eq!(long_lines("a.lua", &text), ["a.lua:3: 101 characters, 100 are allowed"]);
    }

    #[test]
    fn a_long_function_is_found_and_a_test_may_be_longer() {
        let body = "    // Words.\n".repeat(FUNCTION - 1);
        let text = format!("fn a();\nfn b()\n{{\n{body}}}\n");
        let found = long_functions(&source(&text), FUNCTION);
        assert_eq!(found, ["src/x.rs:2: `b` has 72 lines, 70 are allowed"]);
        let test = format!("#[cfg(test)]\nmod tests {{\n{text}}}\n");
        assert_eq!(long_functions(&source(&test), FUNCTION), [""; 0]);
    }

    #[test]
    fn careless_calls_are_found_outside_of_tests_and_words() {
        for text in ["a.unwrap();", "todo!()", "std::println!()", "a.expect(\"b\");"] {
            assert_eq!(careless_calls(&source(text)).len(), 1, "{text}");
        }
        for text in [
            "// a.unwrap()",
            "/// todo!()\nfn a() { b(\"dbg!\") }",
            "#[cfg(test)] mod tests { fn a() { b.unwrap() } }",
            "a.unwrap_or_default()",
            "my_println!()",
            "#[allow(clippy::expect_used)] // The queue has an end.\na.expect(\"b\")",
        ] {
            assert_eq!(careless_calls(&source(text)), [""; 0], "{text}");
        }
    }

    #[test]
    fn documentation_must_say_when_it_fails_and_what_a_drop_does() {
        for text in [
            "/// A.\npub async fn a() {}",
            "/// A.\npub fn a() -> crate::error::Result<u8> {}",
            "/// A.\npub const fn a() -> Result<u8, E> {}",
            "/// A.\n///\n/// # Errors\npub fn a() -> impl Future<Output = Result<u8>> {}",
            "/// # Errors\n/// # Cancel safety\nfn b() {}\n/// A.\npub async fn a() {}",
        ] {
            assert_eq!(missing_sections(&source(text)).len(), 1, "{text}");
        }
        for text in [
            "/// # Errors\n///\n/// # Cancel safety\n#[inline]\npub async fn a() -> Result<u8> {}",
            "pub(crate) async fn a() -> Result<u8> {}",
            "#[doc(hidden)]\npub async fn a() {}",
            "pub fn a(b: fn() -> Result<u8>) -> Option<Result<u8>> {}",
            "trait A { async fn a() -> Result<u8>; }",
        ] {
            assert_eq!(missing_sections(&source(text)), [""; 0], "{text}");
        }
    }

    #[test]
    fn a_public_enum_must_have_been_thought_about() {
        let found = undecided_enums(&source("/// A.\n#[derive(Debug)]\npub enum A { B }"));
        let message = "`A` is neither `#[non_exhaustive]` nor has a comment `exhaustive: why`";
        assert_eq!(found, [format!("src/x.rs:3: {message}")]);
        for text in [
            "#[derive(Debug)]\n#[non_exhaustive]\npub enum A {}",
            "/// A.\n// exhaustive: there are two.\n#[derive(Debug)]\npub enum A {}",
            "pub(crate) enum A {}",
            "enum A {}",
        ] {
            assert_eq!(undecided_enums(&source(text)), [""; 0], "{text}");
        }
        assert_eq!(
            undecided_enums(&source("#[non_exhaustive] pub enum A {}\npub enum B {}")).len(),
            1
        );
    }

    #[test]
    fn a_vague_name_is_found() {
        assert!(vague_name("src/lock/utils.rs").is_some());
        assert!(vague_name("src/manager/mod.rs").is_some());
        assert!(vague_name("src/lock/utility.rs").is_none());
    }

    #[test]
    fn a_script_must_begin_with_what_it_takes_and_returns() {
        let check = |path: &str, text: &str| {
            missing_header(path, |name| match name {
                "b/whole.lua" => "-- KEYS: k.\n-- ARGV: a.\n-- Returns 1.\nreturn 1".to_owned(),
                name if name == path => text.to_owned(),
                _ => String::new(),
            })
        };
        assert!(check("a.sql", "SELECT 1").is_some());
        assert!(check("a.sql", "--\nSELECT 1").is_some());
        assert!(check("a.sql", "-- One.\nSELECT 1").is_none());
        assert!(check("b/a.lua", "-- KEYS, ARGV\nreturn 1").unwrap().ends_with("mention Returns"));
        assert!(check("b/a.lua", "-- A piece of other.lua.").is_some());
        assert!(check("b/a.lua", "-- A piece of whole.lua.").is_none());
        assert!(check("b/whole.lua", "").is_none());
    }

    #[test]
    fn a_path_of_a_machine_is_found() {
        let path = |directory: &str| format!("see /{directory}/some\n");
        for directory in ["work", "root", "tmp"] {
            assert_eq!(machine_paths("a.md", &path(directory)).len(), 1, "{directory}");
            assert_eq!(machine_paths("a.md", &format!("https://a.b/{directory}/c")), [""; 0]);
        }
        assert_eq!(machine_paths("a.md", &path("usr")), [""; 0]);
    }
}
