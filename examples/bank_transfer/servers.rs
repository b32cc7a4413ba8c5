//! Servers of our own, started from what is installed and thrown away at the end, and the
//! decision which servers are used.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::Result;
use crate::options::Options;

/// How long a server may take to start.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where locks and money are, and which of the servers are ours.
pub struct Servers {
    pub locks: String,
    pub store: String,
    pub redis: Option<Redis>,
    // After the servers, before their directory: fields are dropped in this order.
    _postgres: Option<Postgres>,
    _directory: TempDir,
}

impl Servers {
    /// Starts what has to be started.
    pub fn prepare(options: &Options) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("bank_transfer-").tempdir()?;
        // PostgreSQL may run as a user of its own and has to get in.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
        let (locks, redis) = match own_redis_port(&options.locks)? {
            Some(port) => {
                let mut redis =
                    Redis { port, directory: directory.path().to_owned(), process: None };
                redis.start()?;
                (format!("redis://127.0.0.1:{port}"), Some(redis))
            }
            None => (options.locks.clone(), None),
        };
        let (store, postgres) = match options.store.as_str() {
            "postgres:" => {
                let postgres = Postgres::start(directory.path())?;
                (postgres.url.clone(), Some(postgres))
            }
            "sqlite:" => (format!("sqlite:{}", directory.path().join("bank.db").display()), None),
            "sqlite::memory:" => {
                return Err("a database in memory has one connection; use sqlite:PATH".into());
            }
            other if other.starts_with("sqlite:") || other.starts_with("postgres") => {
                (other.to_owned(), None)
            }
            other => return Err(format!("--store {other:?}: use sqlite: or postgres:").into()),
        };
        Ok(Self { locks, store, redis, _postgres: postgres, _directory: directory })
    }
}

/// The port at which a Redis of our own is to be started: none where one listens already, or where
/// we have no business to start one.
fn own_redis_port(url: &str) -> Result<Option<u16>> {
    let Some(rest) = url.strip_prefix("redis:") else { return Ok(None) };
    if rest.is_empty() {
        return free_port().map(Some);
    }
    let host = rest.trim_start_matches('/').split('/').next().unwrap_or_default();
    let (host, port) = host.rsplit_once(':').unwrap_or((host, "6379"));
    let (Ok(port), Ok(mut addresses)) = (port.parse(), (host, 0).to_socket_addrs()) else {
        return Ok(None);
    };
    let loopback = addresses.all(|address| address.ip().is_loopback());
    Ok((loopback && !listens(port)).then_some(port))
}

/// A Redis without persistence: killed, it comes back empty.
pub struct Redis {
    port: u16,
    directory: PathBuf,
    process: Option<Process>,
}

impl Redis {
    pub fn start(&mut self) -> Result<()> {
        let mut command = command("redis-server", None, "KILL");
        command
            .args(["--port", &self.port.to_string(), "--bind", "127.0.0.1"])
            .args(["--save", "", "--appendonly", "no", "--dir"])
            .arg(&self.directory);
        let log = self.directory.join("redis.log");
        let mut process = Process::start(command, &log)?;
        process.wait_until(|| listens(self.port).then_some(()))?;
        self.process = Some(process);
        Ok(())
    }

    pub fn kill(&mut self) -> Result<()> {
        self.process = None;
        Ok(())
    }
}

/// A PostgreSQL with an empty cluster and the usual settings: commits are forced to the disk.
struct Postgres {
    url: String,
    _process: Process,
}

impl Postgres {
    fn start(directory: &Path) -> Result<Self> {
        // It refuses to run as root.
        let user = (fs::metadata("/proc/self")?.uid() == 0).then_some("postgres");
        let (programs, data) = (postgres_programs(), directory.join("postgres"));
        fs::create_dir(&data)?;
        if let Some(user) = user {
            run(Command::new("chown").arg(format!("{user}:")).arg(&data))?;
        }
        let mut initdb = command(programs.join("initdb"), user, "KILL");
        initdb.args([
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-locale",
            "-D",
        ]);
        run(initdb.arg(&data).current_dir(directory))?;
        let port = free_port()?;
        let mut server = command(programs.join("postgres"), user, "QUIT");
        server.args(["-p", &port.to_string(), "-c", "listen_addresses=127.0.0.1"]);
        server.args(["-c", "max_connections=1100", "-D"]).arg(&data).arg("-k").arg(&data);
        let mut process = Process::start(server, &directory.join("postgres.log"))?;
        // It notes there itself when it accepts sessions.
        let notes = || fs::read_to_string(data.join("postmaster.pid")).ok();
        process.wait_until(|| notes()?.contains("ready").then_some(()))?;
        let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
        Ok(Self { url, _process: process })
    }
}

/// The newest version's programs, where distributions keep several; else those of the path.
fn postgres_programs() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let versions = versions.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    versions
        .max()
        .map(|version| PathBuf::from(format!("/usr/lib/postgresql/{version}/bin")))
        .unwrap_or_default()
}

/// A program, as another user if one is given. On Linux, a launcher that replaces itself with it
/// sees to it that it gets `signal` when this process dies.
fn command(program: impl AsRef<Path>, user: Option<&str>, signal: &str) -> Command {
    if !cfg!(target_os = "linux") {
        return Command::new(program.as_ref());
    }
    let mut command = Command::new("setpriv");
    if let Some(user) = user {
        command.args(["--reuid", user, "--regid", user, "--clear-groups"]);
    }
    command.args(["--pdeathsig", signal, "--"]).arg(program.as_ref());
    command
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{command:?}: {said}").into()) }
}

/// A server process; dropped, it is killed.
struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(mut command: Command, log: &Path) -> Result<Self> {
        let out = File::create(log)?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = command.spawn().map_err(|error| format!("{command:?}: {error}"))?;
        Ok(Self { child, log: log.to_owned() })
    }

    fn wait_until(&mut self, ready: impl Fn() -> Option<()>) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while ready().is_none() {
            if self.child.try_wait()?.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(&self.log).unwrap_or_default();
                return Err(format!("a server of our own does not start:\n{log}").into());
            }
            sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn listens(port: u16) -> bool {
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
}

/// A port below the range from which outgoing connections take theirs, so that nobody gets it by
/// chance while its server is down.
fn free_port() -> Result<u16> {
    (0..1000)
        .map(|_| fastrand::u16(10_000..32_000))
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .ok_or_else(|| "there is no free port".into())
}
