//! A PostgreSQL server.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use super::directory::Directory;
use super::port::free_port;
use super::process::{self, Process, find_program, is_root, poll, run};

/// What every server is started with; [`PostgresServer::start_with`] adds to it.
///
/// Nothing is forced to the disk: the tests kill processes, never the machine, and what a process
/// has handed to the kernel outlives it. `synchronous_commit` stays on, so an acknowledged commit
/// has been handed over.
const SETTINGS: [&str; 12] = [
    "listen_addresses=127.0.0.1",
    "fsync=off",
    "full_page_writes=off",
    "shared_buffers=16MB",
    "max_connections=100",
    "max_prepared_transactions=20",
    "autovacuum=off",
    "wal_level=minimal",
    "max_wal_senders=0",
    "max_wal_size=128MB",
    // Its default leaves a segment in memory for ever when the server is killed.
    "dynamic_shared_memory_type=mmap",
    "log_min_messages=warning",
];

/// How the template is made. A change must change the name of the template.
const INITDB: [&str; 7] = [
    "--username=postgres",
    "--auth=trust",
    "--encoding=UTF8",
    "--no-locale",
    "--no-sync",
    "--wal-segsize=1",
    "--no-instructions",
];

/// A PostgreSQL server with an empty cluster, stopped when the handle is dropped.
#[derive(Debug)]
pub struct PostgresServer {
    process: Mutex<Option<Process>>,
    port: u16,
    settings: Vec<String>,
    directory: Directory,
}

impl PostgresServer {
    /// A server with `max_prepared_transactions = 20`.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same with further settings, such as `&["max_prepared_transactions=0"]`.
    pub fn start_with(settings: &[&str]) -> Self {
        let mut server = Self {
            process: Mutex::new(None),
            port: 0,
            settings: SETTINGS.iter().chain(settings).map(ToString::to_string).collect(),
            directory: Directory::new(),
        };
        copy(&template(), &server.data());
        for _ in 0..20 {
            server.port = free_port();
            if server.try_launch().is_ok() {
                return server;
            }
        }
        panic!("postgres does not start: {}", server.try_launch().unwrap_err());
    }

    /// The URL of the database `postgres`, which is empty.
    pub fn url(&self) -> String {
        self.url_for("postgres")
    }

    /// The URL of the database `name`.
    pub fn url_for(&self, name: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{name}", self.port)
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The id of the server's first process, the parent of all others.
    pub fn process_id(&self) -> u32 {
        self.process.lock().unwrap().as_ref().expect("the server runs").id()
    }

    /// Creates the database `name` and returns its URL.
    pub fn create_database(&self, name: &str) -> String {
        self.execute(&format!("CREATE DATABASE \"{name}\""));
        self.url_for(name)
    }

    /// Runs SQL in the database `postgres` on a session of its own and returns the rows, one a
    /// line, with `|` between the columns.
    ///
    /// # Panics
    /// When it fails.
    pub fn execute(&self, sql: &str) -> String {
        let mut psql = Command::new(bin().join("psql"));
        psql.args(["-XqAt", "-v", "ON_ERROR_STOP=1", "-d", &self.url(), "-c", sql]);
        run(psql.env("PGCONNECT_TIMEOUT", "10")).trim_end().to_owned()
    }

    /// Kills all processes of the server at once (SIGKILL), as when the machine's memory runs out.
    /// [`restart`](Self::restart) recovers what was committed.
    pub fn kill(&self) {
        let Some(process) = self.process.lock().unwrap().take() else { return };
        // Stopped first, it cannot start further sessions meanwhile. Each session is the leader of
        // a group of its own, so the processes are found by their parent.
        process::suspend(&[process.id()]);
        let sessions = process::children(process.id());
        process::signal("KILL", &sessions);
        process.kill();
        // Only then may another server open the same files.
        poll("all sessions are gone", || {
            (!sessions.iter().any(|id| process::is_alive(*id))).then_some(())
        });
    }

    /// Stops all processes of the server (SIGSTOP): connections stay, nothing is answered.
    pub fn stop(&self) {
        let id = self.process_id();
        process::suspend(&[id]);
        process::suspend(&process::children(id));
    }

    /// Lets a stopped server go on (SIGCONT).
    pub fn cont(&self) {
        let mut ids = process::children(self.process_id());
        ids.push(self.process_id());
        process::signal("CONT", &ids);
    }

    /// Starts the server again on the same port and with its data; shuts it down before if it runs.
    pub fn restart(&self) {
        if let Some(process) = self.process.lock().unwrap().take() {
            process::signal("INT", &[process.id()]);
            poll("postgres shuts down", || process.has_ended().then_some(()));
        }
        // Another test may hold the port for a moment, to find out whether it is free.
        poll("postgres starts again", || self.try_launch().ok());
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// Starts the process and waits until it accepts sessions, or returns what it printed before it
    /// ended.
    fn try_launch(&self) -> Result<(), String> {
        // The signal lets it take its sessions along and give back its memory segments. It is sent
        // also where it is stopped: the kernel continues a stopped group that loses its parent.
        let mut command = process::command(&bin().join("postgres"), user(), Some("QUIT"));
        command.arg("-D").arg(self.data()).arg("-p").arg(self.port.to_string());
        command.arg("-k").arg(self.data());
        for setting in &self.settings {
            command.arg("-c").arg(setting);
        }
        command.current_dir(self.directory.path());
        let started = Process::start(command, &self.directory.path().join("postgres.log"));
        poll("postgres accepts sessions", || self.readiness(&started))?;
        *self.process.lock().unwrap() = Some(started);
        Ok(())
    }

    /// The server itself notes in this file when it accepts sessions.
    fn readiness(&self, started: &Process) -> Option<Result<(), String>> {
        if started.has_ended() {
            return Some(Err(started.log()));
        }
        let notes = fs::read_to_string(self.data().join("postmaster.pid")).ok()?;
        let lines: Vec<&str> = notes.lines().map(str::trim).collect();
        let mine = lines.first() == Some(&started.id().to_string().as_str());
        (mine && lines.get(7) == Some(&"ready")).then_some(Ok(()))
    }

    /// Ends the server without a checkpoint.
    fn quit(&self) {
        let Ok(mut slot) = self.process.lock() else { return };
        let Some(process) = slot.take() else { return };
        let mut ids = process::children(process.id());
        ids.push(process.id());
        process::signal("CONT", &ids);
        process::signal("QUIT", &[process.id()]);
        // It kills sessions that do not end by themselves after five seconds.
        poll("postgres quits", || process.has_ended().then_some(()));
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        self.quit();
        // A killed server has left its segment, and the system has few of them.
        let notes = fs::read_to_string(self.data().join("postmaster.pid")).unwrap_or_default();
        let segment = notes.lines().nth(6).and_then(|line| line.split_whitespace().nth(1));
        if let Some(segment) = segment {
            let _ = Command::new("ipcrm").arg("-m").arg(segment).output();
        }
    }
}

/// The user to run the server as: it refuses to run as root.
fn user() -> Option<&'static str> {
    is_root().then_some("postgres")
}

/// The directory of the newest installed version's programs.
fn bin() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    versions
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .map(|version| (version, PathBuf::from(format!("/usr/lib/postgresql/{version}/bin"))))
        .filter(|(_, bin)| bin.join("initdb").is_file() && bin.join("postgres").is_file())
        .max()
        .map_or_else(
            // Where the distribution keeps one version only.
            || find_program("initdb").parent().expect("a file has a directory").to_owned(),
            |(_, bin)| bin,
        )
}

/// An empty cluster to copy, which is many times faster than to make one.
///
/// It is made by the first test that needs it, and kept beside the build.
fn template() -> PathBuf {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let version = run(Command::new(bin().join("postgres")).arg("--version"));
    let version = version.split_whitespace().nth(2).unwrap_or("unknown").to_owned();
    let path = home.join(format!("postgres-{version}-template-1"));
    if path.exists() {
        return path;
    }
    fs::create_dir_all(home).unwrap();
    let lock = fs::File::create(home.join("postgres-template.lock")).unwrap();
    lock.lock().unwrap();
    if !path.exists() {
        // Made where the server's user may write, then moved in one step: a template that exists is
        // complete.
        let workshop = Directory::new();
        let fresh = workshop.path().join("data");
        fs::create_dir(&fresh).unwrap();
        if let Some(user) = user() {
            run(Command::new("chown").arg(format!("{user}:")).arg(&fresh));
        }
        let mut initdb = process::command(&bin().join("initdb"), user(), None);
        run(initdb.args(INITDB).arg("-D").arg(&fresh).current_dir(workshop.path()));
        let unfinished = path.with_extension("unfinished");
        let _ = fs::remove_dir_all(&unfinished);
        copy(&fresh, &unfinished);
        fs::rename(&unfinished, &path).unwrap();
    }
    path
}

/// Copies a cluster with its owner and its permissions.
fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").arg("-a").arg("--reflink=auto").arg("--").arg(from).arg(to));
}
