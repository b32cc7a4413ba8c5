//! The scripts, and how one call of a script is put on the wire.

use std::fmt::{self, Write};
use std::sync::OnceLock;

use redis::Cmd;

/// A script, known to the server by the hash of its text.
#[derive(Debug)]
pub(super) struct Script {
    parts: &'static [&'static str],
    text: OnceLock<String>,
    hash: OnceLock<String>,
}

/// Asks for all keys of a set. Without a flag: refused as a whole when memory is full.
pub(super) static ACQUIRE: Script = Script::new(&[
    "#!lua\n",
    include_str!("lua/acquire_fast.lua"),
    include_str!("lua/slots.lua"),
    include_str!("lua/line.lua"),
    include_str!("lua/acquire.lua"),
]);

/// Keeps requests alive.
pub(super) static RENEW: Script = Script::new(&[
    "#!lua flags=allow-oom\n",
    include_str!("lua/renew_fast.lua"),
    include_str!("lua/slots.lua"),
    include_str!("lua/line.lua"),
    include_str!("lua/renew.lua"),
]);

/// Gives up a grant.
pub(super) static RELEASE: Script = Script::new(&[
    "#!lua flags=allow-oom\n",
    include_str!("lua/release_fast.lua"),
    include_str!("lua/slots.lua"),
    include_str!("lua/line.lua"),
    include_str!("lua/release.lua"),
]);

/// Ends a request whatever became of it.
pub(super) static CANCEL: Script = Script::new(&[
    "#!lua flags=allow-oom\n",
    include_str!("lua/cancel_start.lua"),
    include_str!("lua/slots.lua"),
    include_str!("lua/line.lua"),
    include_str!("lua/cancel.lua"),
]);

/// Shows who holds a key and who waits for it.
pub(super) static INSPECT: Script =
    Script::new(&["#!lua flags=no-writes\n", include_str!("lua/inspect.lua")]);

/// Several acquires and releases that meet nobody.
pub(super) static TOGETHER: Script = Script::new(&["#!lua\n", include_str!("lua/together.lua")]);

/// Steps that several scripts take within a loop, or at once, and where each of them stands.
const FRAGMENTS: [(&str, &str); 2] = [
    ("-- include mine.lua\n", include_str!("lua/mine.lua")),
    ("-- include take.lua\n", include_str!("lua/take.lua")),
];

static ALL: [(&str, &Script); 6] = [
    ("acquire", &ACQUIRE),
    ("renew", &RENEW),
    ("release", &RELEASE),
    ("cancel", &CANCEL),
    ("inspect", &INSPECT),
    ("together", &TOGETHER),
];

impl Script {
    const fn new(parts: &'static [&'static str]) -> Self {
        Self { parts, text: OnceLock::new(), hash: OnceLock::new() }
    }

    /// The command that makes the server remember all scripts, one for each.
    pub(super) fn load_all() -> impl Iterator<Item = Cmd> {
        ALL.into_iter().map(|(_, script)| {
            let mut load = redis::cmd("SCRIPT");
            load.arg("LOAD").arg(script.text());
            load
        })
    }

    fn text(&self) -> &str {
        self.text.get_or_init(|| {
            FRAGMENTS
                .iter()
                .fold(self.parts.concat(), |text, (place, lines)| text.replace(place, lines))
        })
    }

    fn hash(&self) -> &str {
        self.hash.get_or_init(|| redis::Script::new(self.text()).get_hash().to_owned())
    }
}

/// Texts one after the other in one buffer: a call may have a thousand of them.
#[derive(Debug, Default)]
pub(super) struct Words {
    text: String,
    ends: Vec<usize>,
}

impl Words {
    /// Adds a word that is made of `pieces`.
    pub(super) fn push(&mut self, pieces: &[&str]) {
        self.text.extend(pieces.iter().copied());
        self.ends.push(self.text.len());
    }

    /// Adds a word that is written by `fmt`.
    pub(super) fn write(&mut self, word: impl fmt::Display) {
        // A string takes everything.
        let _ = write!(self.text, "{word}");
        self.ends.push(self.text.len());
    }

    /// Adds the words of `other`.
    pub(super) fn append(&mut self, other: &Self) {
        let before = self.text.len();
        self.text.push_str(&other.text);
        self.ends.extend(other.ends.iter().map(|end| before + end));
    }

    /// Makes place for more words, of so many bytes together.
    pub(super) fn reserve(&mut self, words: usize, bytes: usize) {
        self.text.reserve(bytes);
        self.ends.reserve(words);
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    fn each(&self) -> impl Iterator<Item = &str> {
        let mut from = 0;
        self.ends
            .iter()
            .filter_map(move |end| self.text.get(std::mem::replace(&mut from, *end)..*end))
    }
}

/// What one backend sends: the scripts above, unless a test has edited them for this one.
#[derive(Debug, Default)]
pub(super) struct Scripts {
    edited: Vec<(&'static Script, Script)>,
}

impl Scripts {
    /// The scripts as `edit` returns them, which is shown the name and the text of each.
    #[cfg(feature = "testing")]
    pub(super) fn edited<E>(
        mut edit: impl FnMut(&'static str, &'static str) -> Result<&'static str, E>,
    ) -> Result<Self, E> {
        let edited = ALL.into_iter().map(|(name, script)| {
            let text = OnceLock::from(edit(name, script.text())?.to_owned());
            Ok((script, Script { parts: &[], text, hash: OnceLock::new() }))
        });
        Ok(Self { edited: edited.collect::<Result<_, E>>()? })
    }

    fn of(&self, script: &'static Script) -> &Script {
        let edited = self.edited.iter().find(|(of, _)| std::ptr::eq(*of, script));
        edited.map_or(script, |(_, edited)| edited)
    }
}

/// One call of a script.
#[derive(Debug)]
pub(super) struct Call {
    script: &'static Script,
    keys: Words,
    args: Words,
}

impl Call {
    pub(super) fn new(script: &'static Script, keys: Words, args: Words) -> Self {
        Self { script, keys, args }
    }

    /// The call, for a server that knows the script.
    pub(super) fn by_hash(&self, scripts: &Scripts) -> Cmd {
        self.command("EVALSHA", scripts.of(self.script).hash())
    }

    /// The call with the text of the script, which the server then knows.
    pub(super) fn by_text(&self, scripts: &Scripts) -> Cmd {
        self.command("EVAL", scripts.of(self.script).text())
    }

    fn command(&self, name: &str, script: &str) -> Cmd {
        let (keys, args) = (self.keys.len(), self.args.len());
        let bytes = self.keys.text.len() + self.args.text.len() + name.len() + script.len() + 8;
        let mut command = Cmd::with_capacity(keys + args + 3, bytes);
        command.arg(name).arg(script).arg(keys);
        self.keys.each().chain(self.args.each()).for_each(|word| {
            command.arg(word);
        });
        command
    }
}
