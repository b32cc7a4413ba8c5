//! A Rust file as text, taken apart just enough to tell code from comments, strings and tests.

use std::fs;
use std::ops::Range;
use std::path::Path;

/// One file. `code` and `comments` are `text` with everything else replaced by blanks, so an offset
/// or a line means the same in all three.
pub struct Source {
    /// Relative to the crate, with forward slashes.
    pub path: String,
    pub text: String,
    /// Without comments and without what strings and characters contain.
    pub code: String,
    /// Only comments.
    pub comments: String,
    /// Items under `#[cfg(test)]`.
    tests: Vec<Range<usize>>,
    /// Names of modules declared as `#[cfg(test)] mod name;`.
    test_modules: Vec<String>,
}

/// One `fn` with a name.
pub struct Function<'a> {
    pub name: &'a str,
    pub at: usize,
    /// Comments and attributes above it.
    pub above: Range<usize>,
    /// What stands before `fn`, such as `pub async`.
    pub qualifiers: &'a str,
    /// The type after the arrow, empty where there is none.
    pub returns: &'a str,
    /// From `fn` to the closing brace.
    pub lines: usize,
}

impl Source {
    pub fn parse(path: &str, text: &str) -> Self {
        let (code, comments) = separate(text);
        let (tests, test_modules) = test_items(&code);
        let (path, text) = (path.to_owned(), text.to_owned());
        Self { path, text, code, comments, tests, test_modules }
    }

    /// All Rust files under `directory` of the crate, with test modules in files of their own
    /// recognised as tests.
    pub fn all(directory: &str) -> Vec<Self> {
        let rust = files(directory).into_iter().filter(|path| path.ends_with(".rs"));
        let mut all: Vec<Self> = rust.map(|path| Self::parse(&path, &read(&path))).collect();
        Self::mark_test_files(&mut all);
        all
    }

    pub fn mark_test_files(all: &mut [Self]) {
        let modules: Vec<String> = all
            .iter()
            .flat_map(|file| {
                let base = file.path.strip_suffix("/mod.rs").or(file.path.strip_suffix("/lib.rs"));
                let base = base.or(file.path.strip_suffix(".rs")).unwrap_or_default();
                file.test_modules.iter().map(move |name| format!("{base}/{name}"))
            })
            .collect();
        for file in all {
            let is = |module: &String| {
                let rest = file.path.strip_prefix(module.as_str());
                rest.is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
            };
            if modules.iter().any(is) {
                file.tests = std::iter::once(0..file.text.len()).collect();
            }
        }
    }

    /// The number of the line, from 1.
    pub fn line(&self, at: usize) -> usize {
        self.text[..at].matches('\n').count() + 1
    }

    /// A message about a place.
    pub fn report(&self, at: usize, message: &str) -> String {
        format!("{}:{}: {message}", self.path, self.line(at))
    }

    pub fn is_test(&self, at: usize) -> bool {
        self.tests.iter().any(|range| range.contains(&at))
    }

    /// Where `text` stands in the code outside of tests.
    pub fn outside_tests(&self, text: &str) -> Vec<usize> {
        let found = self.code.match_indices(text).map(|(at, _)| at);
        found.filter(|at| !self.is_test(*at)).collect()
    }

    /// Lines that are neither blank, nor comment, nor test.
    pub fn code_lines(&self) -> usize {
        let mut at = 0;
        let lines = self.code.split_inclusive('\n').filter(|line| {
            let start = at;
            at += line.len();
            let blank = self.text[start..at].trim().is_empty();
            // A line within a string has no code left, but is not a comment either.
            let comment = line.trim().is_empty() && !self.comments[start..at].trim().is_empty();
            !blank && !comment && !self.is_test(start)
        });
        lines.count()
    }

    pub fn functions(&self) -> Vec<Function<'_>> {
        words(&self.code, "fn").filter_map(|at| self.function(at)).collect()
    }

    fn function(&self, at: usize) -> Option<Function<'_>> {
        let code = &self.code;
        let name = identifier(code[at + 2..].trim_start());
        if name.is_empty() {
            return None;
        }
        let open = at + code[at..].find(name)? + name.len();
        let end = item_end(code, open);
        let body = code[open..end].find('{').map_or(end, |brace| open + brace);
        let above = self.above(at);
        Some(Function {
            name,
            at,
            qualifiers: code[above.end..at].trim(),
            above,
            returns: returned(&code[open..body]),
            lines: self.line(end) - self.line(at) + 1,
        })
    }

    /// The comments and attributes above the item whose keyword is at `at`; it ends where its
    /// visibility begins.
    pub fn above(&self, at: usize) -> Range<usize> {
        let before = &self.code[..at];
        let mut start = before.rfind([';', '{', '}', ']']).map_or(0, |last| last + 1);
        let end = at - before[start..].trim_start().len();
        while let Some(rest) = before[..start].trim_end().strip_suffix(']') {
            let mut depth = 1;
            let open = rest.rfind(|c: char| {
                depth += i32::from(c == ']') - i32::from(c == '[');
                depth == 0
            });
            let Some(open) = open else { break };
            if !rest[..open].ends_with(['#', '!']) {
                break;
            }
            start = open - 1;
        }
        before[..start].trim_end().len()..end
    }

    /// The inline modules around a place, from the outside.
    pub fn modules_around(&self, at: usize) -> Vec<&str> {
        words(&self.code, "mod")
            .filter_map(|module| {
                let name = identifier(self.code[module + 3..].trim_start());
                (module..item_end(&self.code, module)).contains(&at).then_some(name)
            })
            .collect()
    }
}

/// Where `word` stands as a word of its own.
pub fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word).map(|(at, _)| at).filter(move |at| {
        !code[..*at].ends_with(is_part) && !code[at + word.len()..].starts_with(is_part)
    })
}

/// The identifier at the start of `code`, perhaps empty.
pub fn identifier(code: &str) -> &str {
    &code[..code.find(|c| !is_part(c)).unwrap_or(code.len())]
}

fn is_part(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Every file under `directory` of the crate, sorted. Build output is left out.
pub fn files(directory: &str) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut open = vec![root.join(directory)];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if name == ".git" || name == "target" || path.join("CACHEDIR.TAG").exists() {
                continue;
            }
            if path.is_dir() {
                open.push(path);
            } else if let Ok(relative) = path.strip_prefix(root) {
                found.push(relative.to_string_lossy().replace('\\', "/"));
            }
        }
    }
    found.sort();
    found
}

/// The text of a file of the crate; of one that is not text, nothing.
pub fn read(path: &str) -> String {
    let bytes = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap_or_default();
    String::from_utf8(bytes).unwrap_or_default()
}

/// The end of the item at `at`: behind its semicolon or its closing brace.
fn item_end(code: &str, at: usize) -> usize {
    let (mut round, mut curly) = (0, 0);
    for (offset, c) in code[at..].char_indices() {
        match c {
            '(' | '[' => round += 1,
            ')' | ']' => round -= 1,
            '{' => curly += 1,
            '}' => curly -= 1,
            ';' if round == 0 && curly == 0 => return at + offset + 1,
            _ => {}
        }
        if c == '}' && curly == 0 && round == 0 {
            return at + offset + 1;
        }
    }
    code.len()
}

/// The items under `#[cfg(test)]`, and the names of those that are modules in another file.
fn test_items(code: &str) -> (Vec<Range<usize>>, Vec<String>) {
    let (mut items, mut modules) = (Vec::new(), Vec::new());
    for (at, _) in code.match_indices("#[cfg(").chain(code.match_indices("#![cfg(")) {
        let open = at + code[at..].find('[').unwrap_or_default();
        let condition = &code[open..item_end_of_brackets(code, open)];
        let only = words(condition, "test").next().is_some();
        if !only || condition.contains("any(") || condition.contains("not(") {
            continue;
        }
        if code[at..].starts_with("#!") {
            return (std::iter::once(0..code.len()).collect(), modules);
        }
        let mut item = open + condition.len();
        while code[item..].trim_start().starts_with("#[") {
            item = item_end_of_brackets(code, item + code[item..].find('[').unwrap_or_default());
        }
        let end = item_end(code, item);
        items.push(at..end);
        let text = code[item..end].trim().trim_start_matches("pub(crate) ");
        let name = text.strip_prefix("mod ").and_then(|text| text.strip_suffix(';'));
        modules.extend(name.map(ToOwned::to_owned));
    }
    (items, modules)
}

/// Behind the bracket that closes the one at `open`.
fn item_end_of_brackets(code: &str, open: usize) -> usize {
    let mut depth = 0;
    let close = code[open..].find(|c: char| {
        depth += i32::from(c == '[') - i32::from(c == ']');
        depth == 0
    });
    close.map_or(code.len(), |close| open + close + 1)
}

/// The type after the arrow in what stands between a function's name and its body.
fn returned(signature: &str) -> &str {
    let (mut depth, mut start, mut end) = (0_i32, None, signature.len());
    for (at, c) in signature.char_indices() {
        let arrow = signature[..at].ends_with(['-', '=']) && c == '>';
        depth += i32::from("([<".contains(c)) - i32::from(")]>".contains(c) && !arrow);
        if depth == 0 && arrow && start.is_none() {
            start = Some(at + 1);
        }
        let clause = signature[at..].starts_with("where") && signature[..at].ends_with([' ', '\n']);
        if depth == 0 && clause && !signature[at + 5..].starts_with(is_part) {
            end = at;
            break;
        }
    }
    start.map_or("", |start| signature[start..end].trim())
}

/// Splits `text` into code and comments of the same length.
fn separate(text: &str) -> (String, String) {
    let (mut code, mut comments) = (String::new(), String::new());
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let (length, comment) = if rest.starts_with("//") {
            (rest.find('\n').unwrap_or(rest.len()), true)
        } else if rest.starts_with("/*") {
            (block_comment(rest), true)
        } else {
            let inside_word = text[..at].ends_with(is_part);
            (literal(rest, inside_word), false)
        };
        if length == 0 {
            let c = rest.chars().next().unwrap_or(' ');
            code.push(c);
            blank(&mut comments, &rest[..c.len_utf8()]);
            at += c.len_utf8();
            continue;
        }
        let part = &rest[..length];
        blank(&mut code, part);
        if comment {
            comments.push_str(part);
        } else {
            blank(&mut comments, part);
        }
        at += length;
    }
    (code, comments)
}

fn blank(out: &mut String, part: &str) {
    out.extend(part.bytes().map(|byte| if byte == b'\n' { '\n' } else { ' ' }));
}

fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        let two = rest.as_bytes().get(at..at + 2).unwrap_or_default();
        match two {
            b"/*" => depth += 1,
            b"*/" => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

/// The length of the string or character at the start of `rest`, 0 where there is none.
fn literal(rest: &str, inside_word: bool) -> usize {
    let prefix = rest.len() - rest.trim_start_matches(['b', 'c', 'r']).len();
    let raw = !inside_word && prefix <= 2 && rest[..prefix].ends_with('r');
    let hashes = rest[prefix..].len() - rest[prefix..].trim_start_matches('#').len();
    if raw && rest[prefix + hashes..].starts_with('"') {
        let end = format!("\"{}", "#".repeat(hashes));
        let start = prefix + hashes + 1;
        return rest[start..].find(&end).map_or(rest.len(), |at| start + at + end.len());
    }
    if rest.starts_with('"') {
        return quoted(rest, '"');
    }
    // A lifetime has no closing quote behind its first character.
    let character = rest.strip_prefix('\'').is_some_and(|inner| {
        inner.starts_with('\\') || inner.chars().nth(1) == Some('\'') && !inner.starts_with('\'')
    });
    if character { quoted(rest, '\'') } else { 0 }
}

fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = true;
    let end = rest.char_indices().find(|(_, c)| {
        let found = *c == quote && !escaped;
        escaped = *c == '\\' && !escaped;
        found
    });
    end.map_or(rest.len(), |(at, _)| at + 1)
}

#[test]
fn comments_strings_and_characters_are_no_code() {
    let text =
        "a /* b /* c */ d */ e // f\n\"g\\\"h\" i 'j' '\\'' k: &'l r#\"m\"n\"# o b\"p\" r#q é";
    let source = Source::parse("src/x.rs", text);
    assert_eq!(
        source.code.split_whitespace().collect::<Vec<_>>().join(" "),
        "a e i k: &'l o b r#q é"
    );
    assert_eq!(source.code.len(), text.len());
    assert_eq!(source.comments.len(), text.len());
    assert_eq!(source.comments.split_whitespace().next_back(), Some("f"));
}

#[test]
fn test_modules_are_found_inline_and_in_files() {
    let text = "fn a() {}\n#[cfg(test)]\n#[allow(x)]\nmod tests {\n    fn b() {}\n}\nfn c() {}\n";
    let inline = Source::parse("src/x.rs", text);
    assert_eq!(inline.functions().len(), 3);
    let outside: Vec<_> =
        inline.functions().into_iter().filter(|f| !inline.is_test(f.at)).collect();
    assert_eq!(outside.iter().map(|f| f.name).collect::<Vec<_>>(), ["a", "c"]);
    assert_eq!(inline.code_lines(), 2);
    let mut all = [
        Source::parse("src/y/mod.rs", "#[cfg(all(test, feature = \"z\"))] mod tests;"),
        Source::parse("src/y/tests.rs", "fn a() {}"),
        Source::parse("src/y/tests/deep.rs", "fn a() {}"),
        Source::parse("src/tests.rs", "fn a() {}"),
        Source::parse("src/z.rs", "#[cfg(any(test, feature = \"testing\"))] fn a() {}"),
    ];
    Source::mark_test_files(&mut all);
    assert_eq!(all.map(|file| file.is_test(file.code.len() - 1)), [true, true, true, false, false]);
}

#[test]
fn functions_are_read_with_what_surrounds_them() {
    let text = "struct A;\n/// Docs.\n#[must_use = \"]\"]\n#[inline]\n\
                pub(crate) async fn f<F>(g: F) -> Result<u8>\nwhere\n    F: Fn() -> u8,\n{\n}\n";
    let source = Source::parse("src/x.rs", text);
    let functions = source.functions();
    let f = &functions[0];
    assert_eq!((f.name, f.qualifiers, f.returns), ("f", "pub(crate) async", "Result<u8>"));
    assert_eq!(f.lines, 5);
    assert_eq!(source.comments[f.above.clone()].trim(), "/// Docs.");
    assert!(source.text[f.above.clone()].contains("#[inline]"));
    assert_eq!(returned("(f: impl Fn(u8) -> u8)"), "");
    assert_eq!(returned("<F: Fn() -> u8>(f: F) -> [u8; 2]"), "[u8; 2]");
}
