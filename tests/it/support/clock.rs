//! A server whose wall clock is wrong.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::directory::Directory;
use super::process::run;

/// The wall clock of one server. Its monotonic clock is left alone.
#[derive(Debug)]
pub struct ServerClock {
    directory: Directory,
}

impl ServerClock {
    pub fn new() -> Self {
        let clock = Self { directory: Directory::new() };
        fs::write(clock.file(), 0_i64.to_ne_bytes()).unwrap();
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/support/clock.c");
        let mut compile = Command::new("cc");
        run(compile.args(["-shared", "-fPIC", "-O1", "-o"]).arg(clock.library()).arg(source));
        clock
    }

    /// From now on the clock is so many seconds ahead, or behind.
    pub fn set_ahead(&self, seconds: i64) {
        // Written in place: the server has the file in its memory.
        let mut file = fs::File::options().write(true).open(self.file()).unwrap();
        std::io::Write::write_all(&mut file, &(seconds * 1_000_000).to_ne_bytes()).unwrap();
    }

    /// What the server's environment must hold.
    pub fn environment(&self) -> [(&'static str, PathBuf); 2] {
        [("LD_PRELOAD", self.library()), ("SERVER_CLOCK", self.file())]
    }

    fn library(&self) -> PathBuf {
        self.directory.path().join("clock.so")
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("ahead")
    }
}
