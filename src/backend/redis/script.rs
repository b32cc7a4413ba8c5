//! The scripts, and how one call of a script is put on the wire.

use std::borrow::Cow;
use std::io::Write as _;
use std::sync::OnceLock;

use redis::{Arg, Cmd, RedisWrite as _, ToRedisArgs};

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
    include_str!("lua/acquire_join.lua"),
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
    include_str!("lua/release_next.lua"),
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
const FRAGMENTS: [(&str, &str); 3] = [
    ("-- include grace.lua\n", include_str!("lua/grace.lua")),
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

/// One call of a script, as it is sent to a server that knows the script.
pub(super) struct Call {
    script: &'static Script,
    command: Cmd,
}

impl Call {
    /// A call with so many keys, and about so many arguments and bytes of all of them.
    pub(super) fn new(script: &'static Script, keys: usize, args: usize, bytes: usize) -> Self {
        let hash = script.hash();
        let mut command = Cmd::with_capacity(3 + keys + args, 16 + hash.len() + bytes);
        command.arg("EVALSHA").arg(hash).arg(keys);
        Self { script, command }
    }

    /// Adds a key, which is made of `pieces`. All keys come before all arguments.
    pub(super) fn key(&mut self, pieces: &[&str]) {
        let mut key = self.command.writer_for_next_arg();
        for piece in pieces {
            // A buffer takes everything.
            let _ = key.write_all(piece.as_bytes());
        }
    }

    /// Adds an argument.
    pub(super) fn arg(&mut self, arg: impl ToRedisArgs) {
        self.command.arg(arg);
    }

    /// The call, for a server that knows the script.
    pub(super) fn by_hash(&self, scripts: &Scripts) -> Cow<'_, Cmd> {
        let script = scripts.of(self.script);
        if std::ptr::eq(script, self.script) {
            return Cow::Borrowed(&self.command);
        }
        Cow::Owned(self.rewritten("EVALSHA", script.hash()))
    }

    /// The call with the text of the script, which the server then knows.
    pub(super) fn by_text(&self, scripts: &Scripts) -> Cmd {
        self.rewritten("EVAL", scripts.of(self.script).text())
    }

    fn rewritten(&self, name: &str, script: &str) -> Cmd {
        let mut command = redis::cmd(name);
        command.arg(script);
        for arg in self.command.args_iter().skip(2) {
            if let Arg::Simple(arg) = arg {
                command.arg(arg);
            }
        }
        command
    }
}
