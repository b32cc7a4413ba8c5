//! Server processes: how they are started, signalled and ended.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// How long a server may take to start or to stop, on a machine that is busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `ready` gives a value.
///
/// # Panics
/// When it gives none for [`PATIENCE`].
pub fn poll<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// The program called `name`.
///
/// # Panics
/// When it is not installed.
pub fn find_program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/local/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .unwrap_or_else(|| panic!("{name} is not installed: run scripts/setup"))
}

/// Whether this process runs as root, which some servers refuse to do.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

/// `program`, to be run as `user` if one is given; and if `death_signal` is, to be signalled so
/// when its parent dies.
pub fn command(program: &Path, user: Option<&str>, death_signal: Option<&str>) -> Command {
    if user.is_none() && death_signal.is_none() {
        return Command::new(program);
    }
    // The launcher replaces itself with the program, so the process id is that of the program.
    let mut command = Command::new(find_program("setpriv"));
    if let Some(user) = user {
        command.arg("--reuid").arg(user).arg("--regid").arg(user).arg("--clear-groups");
    }
    if let Some(signal) = death_signal {
        command.arg("--pdeathsig").arg(signal);
    }
    command.arg("--").arg(program);
    command
}

/// Runs `command` to its end and returns what it printed.
///
/// # Panics
/// When it fails.
pub fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| {
        panic!("cannot run {command:?}: {error}; is it installed? run scripts/setup")
    });
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    stdout
}

/// Sends `signal` to each process; one that is gone already is no error.
pub fn signal(signal: &str, ids: &[u32]) {
    // One shell for all of them: a call into the system would need unsafe code or one more crate.
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    let script = format!("kill -{signal} {} 2>&1 || true", ids.join(" "));
    run(Command::new("sh").arg("-c").arg(script));
}

/// Stops processes and returns when they do nothing any more.
pub fn suspend(ids: &[u32]) {
    signal("STOP", ids);
    poll("the processes are stopped", || {
        ids.iter().all(|id| matches!(state(*id), None | Some('T' | 'Z' | 'X'))).then_some(())
    });
}

/// The children of a process.
pub fn children(parent: u32) -> Vec<u32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|id| status(*id).is_some_and(|(_, of)| of == parent))
        .collect()
}

fn state(id: u32) -> Option<char> {
    status(id).map(|(state, _)| state)
}

/// State and parent. The name before them is in parentheses and may itself contain some.
fn status(id: u32) -> Option<(char, u32)> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// Whether a process still runs.
pub fn is_alive(id: u32) -> bool {
    !matches!(state(id), None | Some('Z' | 'X'))
}

/// A server that dies with the test process.
#[derive(Debug)]
pub struct Process {
    child: Mutex<Child>,
    id: u32,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, with its output appended to the file `log`.
    pub fn start(mut command: Command, log: &Path) -> Self {
        let out = fs::File::options().create(true).append(true).open(log).unwrap();
        // A group of its own, so that an interrupt at the terminal reaches the test alone, which
        // then takes the server with it.
        command.stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out).process_group(0);
        let text = format!("{command:?}");
        let child =
            fork_from_lasting_thread(command).unwrap_or_else(|error| panic!("{text}: {error}"));
        let id = child.id();
        Self { child: Mutex::new(child), id, log: log.to_owned() }
    }

    pub fn id(&self) -> u32 {
        self.id
    }

    /// What the server has printed.
    pub fn log(&self) -> String {
        fs::read(&self.log).map_or_else(
            |error| error.to_string(),
            |bytes| String::from_utf8_lossy(&bytes).into_owned(),
        )
    }

    /// Whether the process has ended.
    pub fn has_ended(&self) -> bool {
        self.child.lock().unwrap().try_wait().unwrap().is_some()
    }

    /// Kills the process, at once and also where it is stopped, and waits for its end.
    pub fn kill(&self) {
        let mut child = self.child.lock().unwrap();
        // Fails only where the process has ended and was waited for.
        let _ = child.kill();
        child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A test that fails must fail with its own message, so nothing here may panic.
        if let Ok(child) = self.child.get_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

type Order = (Command, mpsc::Sender<io::Result<Child>>);

/// Starts `command` from a thread that ends only with the process: see the module's parent.
fn fork_from_lasting_thread(command: Command) -> io::Result<Child> {
    static ORDERS: LazyLock<Mutex<mpsc::Sender<Order>>> = LazyLock::new(|| {
        let (sender, orders) = mpsc::channel::<Order>();
        thread::Builder::new()
            .name("servers".to_owned())
            .spawn(move || {
                for (mut command, reply) in orders {
                    let _ = reply.send(command.spawn());
                }
            })
            .expect("a thread");
        Mutex::new(sender)
    });
    let (reply, answer) = mpsc::channel();
    ORDERS.lock().unwrap().send((command, reply)).expect("the thread lasts");
    answer.recv().expect("the thread lasts")
}
