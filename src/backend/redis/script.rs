//! The scripts, and how one call of a script is put on the wire.

use std::sync::OnceLock;

use redis::Cmd;

/// A script, known to the server by the hash of its text.
#[derive(Debug)]
pub(super) struct Script {
    text: &'static str,
    hash: OnceLock<String>,
}

/// Asks for all keys of a set. Without a flag: refused as a whole when memory is full.
pub(super) static ACQUIRE: Script = Script::new(concat!(
    "#!lua\n",
    include_str!("lua/acquire_fast.lua"),
    include_str!("lua/slots.lua"),
    include_str!("lua/line.lua"),
    include_str!("lua/acquire.lua"),
));

/// Keeps requests alive.
pub(super) static RENEW: Script = Script::new(concat!(
    "#!lua flags=allow-oom\n",
    include_str!("lua/renew_fast.lua"),
    include_str!("lua/slots.lua"),
    include_str!("lua/line.lua"),
    include_str!("lua/renew.lua"),
));

/// Gives up a grant.
pub(super) static RELEASE: Script = Script::new(concat!(
    "#!lua flags=allow-oom\n",
    include_str!("lua/release_fast.lua"),
    include_str!("lua/slots.lua"),
    include_str!("lua/line.lua"),
    include_str!("lua/release.lua"),
));

/// Ends a request whatever became of it.
pub(super) static CANCEL: Script = Script::new(concat!(
    "#!lua flags=allow-oom\n",
    include_str!("lua/cancel_start.lua"),
    include_str!("lua/slots.lua"),
    include_str!("lua/line.lua"),
    include_str!("lua/cancel.lua"),
));

/// Shows who holds a key and who waits for it.
pub(super) static INSPECT: Script =
    Script::new(concat!("#!lua flags=no-writes\n", include_str!("lua/inspect.lua")));

static ALL: [(&str, &Script); 5] = [
    ("acquire", &ACQUIRE),
    ("renew", &RENEW),
    ("release", &RELEASE),
    ("cancel", &CANCEL),
    ("inspect", &INSPECT),
];

impl Script {
    const fn new(text: &'static str) -> Self {
        Self { text, hash: OnceLock::new() }
    }

    /// The command that makes the server remember all scripts, one for each.
    pub(super) fn load_all() -> impl Iterator<Item = Cmd> {
        ALL.into_iter().map(|(_, script)| {
            let mut load = redis::cmd("SCRIPT");
            load.arg("LOAD").arg(script.text);
            load
        })
    }

    fn hash(&self) -> &str {
        self.hash.get_or_init(|| redis::Script::new(self.text).get_hash().to_owned())
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
            let text = edit(name, script.text)?;
            Ok((script, Script::new(text)))
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
    keys: Vec<String>,
    args: Vec<String>,
}

impl Call {
    pub(super) fn new(script: &'static Script, keys: Vec<String>, args: Vec<String>) -> Self {
        Self { script, keys, args }
    }

    /// The call, for a server that knows the script.
    pub(super) fn by_hash(&self, scripts: &Scripts) -> Cmd {
        self.command("EVALSHA", scripts.of(self.script).hash())
    }

    /// The call with the text of the script, which the server then knows.
    pub(super) fn by_text(&self, scripts: &Scripts) -> Cmd {
        self.command("EVAL", scripts.of(self.script).text)
    }

    fn command(&self, name: &str, script: &str) -> Cmd {
        let mut command = redis::cmd(name);
        command.arg(script).arg(self.keys.len()).arg(&self.keys).arg(&self.args);
        command
    }
}
