//! A Redis server.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Mutex;
use std::time::Duration;

use super::clock::ServerClock;
use super::directory::Directory;
use super::port::free_port;
use super::process::{self, Process, find_program, poll};

/// How long [`RedisServer::command`] waits for a reply.
const REPLY_WITHIN: Duration = Duration::from_secs(10);

/// A Redis server without persistence, stopped when the handle is dropped.
#[derive(Debug)]
pub struct RedisServer {
    // The process ends before its directory goes: fields are dropped in this order.
    process: Mutex<Option<Process>>,
    port: u16,
    args: Vec<String>,
    clock: Option<Box<ServerClock>>,
    password: Option<String>,
    directory: Directory,
}

/// An argument that stands for the port after that of the server.
pub const NEXT_PORT: &str = "the next port";

impl RedisServer {
    /// A server as Debian configures it, without persistence.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same with further arguments, such as `&["--maxmemory", "2mb"]`. With `--requirepass` the
    /// password becomes part of [`url`](Self::url).
    pub fn start_with(args: &[&str]) -> Self {
        Self::start_by(args, None)
    }

    /// A server whose clock a test can set.
    pub fn start_with_clock(clock: ServerClock) -> Self {
        Self::start_by(&[], Some(clock))
    }

    fn start_by(args: &[&str], clock: Option<ServerClock>) -> Self {
        let password = args.windows(2).find(|pair| pair[0] == "--requirepass");
        let mut server = Self {
            process: Mutex::new(None),
            port: 0,
            args: args.iter().map(ToString::to_string).collect(),
            clock: clock.map(Box::new),
            password: password.map(|pair| pair[1].to_owned()),
            directory: Directory::new(),
        };
        for _ in 0..20 {
            server.port = free_port();
            if server.try_launch().is_ok() {
                return server;
            }
        }
        panic!("redis-server does not start: {}", server.try_launch().unwrap_err());
    }

    /// `redis://127.0.0.1:port`
    pub fn url(&self) -> String {
        match &self.password {
            Some(password) => format!("redis://:{password}@127.0.0.1:{}", self.port),
            None => format!("redis://127.0.0.1:{}", self.port),
        }
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The port after that, where the arguments name [`NEXT_PORT`].
    pub fn next_port(&self) -> u16 {
        self.port + 1
    }

    /// The clock that it was started with.
    pub fn clock(&self) -> &ServerClock {
        self.clock.as_deref().expect("the server was started with a clock")
    }

    /// The id of the server process.
    pub fn process_id(&self) -> u32 {
        self.process.lock().unwrap().as_ref().expect("the server runs").id()
    }

    /// Kills the server (SIGKILL): connections break, the data is gone.
    pub fn kill(&self) {
        *self.process.lock().unwrap() = None;
    }

    /// Stops the server (SIGSTOP): connections stay, nothing is answered.
    pub fn stop(&self) {
        process::suspend(&[self.process_id()]);
    }

    /// Lets a stopped server go on (SIGCONT).
    pub fn cont(&self) {
        process::signal("CONT", &[self.process_id()]);
    }

    /// Kills the server if it runs, and starts it again on the same port without any data.
    pub fn restart_empty(&self) {
        self.kill();
        // Another test may hold the port for a moment, to find out whether it is free.
        poll("redis-server starts again", || self.try_launch().ok());
    }

    /// Sends one command on a connection of its own and returns the reply as text: integers in
    /// decimal, nil as `(nil)`, arrays with an element a line.
    ///
    /// # Panics
    /// When the server answers with an error, or not at all.
    pub fn command(&self, command: &[&str]) -> String {
        self.try_command(command).unwrap_or_else(|error| panic!("{command:?}: {error}"))
    }

    /// Like [`command`](Self::command); an error reply is returned, such as `ERR syntax error`.
    pub fn try_command(&self, command: &[&str]) -> Result<String, String> {
        let mut connection = Connection::open(self.port).map_err(|error| error.to_string())?;
        if let Some(password) = &self.password {
            connection.call(&["AUTH", password])?;
        }
        connection.call(command)
    }

    /// Starts the process and waits until it answers, or returns what it printed before it ended.
    fn try_launch(&self) -> Result<(), String> {
        let program = find_program("redis-server");
        let mut command = process::command(&program, None, Some("KILL"));
        command
            .args(["--port", &self.port.to_string(), "--bind", "127.0.0.1", "--save", ""])
            .args(["--appendonly", "no", "--dir"])
            .arg(self.directory.path());
        for arg in &self.args {
            let next = (arg == NEXT_PORT).then(|| self.next_port().to_string());
            command.arg(next.unwrap_or_else(|| arg.clone()));
        }
        if let Some(clock) = &self.clock {
            command.envs(clock.environment());
        }
        let started = Process::start(command, &self.directory.path().join("redis.log"));
        poll("redis-server answers", || self.readiness(&started))?;
        *self.process.lock().unwrap() = Some(started);
        Ok(())
    }

    /// Whether the started process, and no other server on this port, answers.
    fn readiness(&self, started: &Process) -> Option<Result<(), String>> {
        if started.has_ended() {
            return Some(Err(started.log()));
        }
        let info = self.try_command(&["INFO", "server"]).ok()?;
        info.contains(&format!("process_id:{}\r\n", started.id())).then_some(Ok(()))
    }
}

/// A connection that knows just enough of the protocol to ask and to read what comes back.
struct Connection(BufReader<TcpStream>);

impl Connection {
    fn open(port: u16) -> io::Result<Self> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(REPLY_WITHIN))?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    fn call(&mut self, command: &[&str]) -> Result<String, String> {
        let mut request = format!("*{}\r\n", command.len());
        for part in command {
            request.push_str(&format!("${}\r\n{part}\r\n", part.len()));
        }
        self.0.get_mut().write_all(request.as_bytes()).map_err(|error| error.to_string())?;
        self.reply().unwrap_or_else(|error| Err(error.to_string()))
    }

    /// The outer error is one of the connection, the inner one a reply.
    fn reply(&mut self) -> io::Result<Result<String, String>> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let broken = || io::Error::new(io::ErrorKind::InvalidData, line.clone());
        let (kind, rest) = line.trim_end().split_at_checked(1).ok_or_else(broken)?;
        match kind {
            "+" | ":" => Ok(Ok(rest.to_owned())),
            "-" => Ok(Err(rest.to_owned())),
            "$" | "*" if rest == "-1" => Ok(Ok("(nil)".to_owned())),
            "$" => {
                let mut bytes = vec![0; rest.parse::<usize>().map_err(|_| broken())? + 2];
                self.0.read_exact(&mut bytes)?;
                bytes.truncate(bytes.len() - 2);
                Ok(Ok(String::from_utf8_lossy(&bytes).into_owned()))
            }
            "*" => {
                let count = rest.parse::<usize>().map_err(|_| broken())?;
                let parts: io::Result<Result<Vec<_>, _>> =
                    (0..count).map(|_| self.reply()).collect();
                parts.map(|parts| parts.map(|parts| parts.join("\n")))
            }
            _ => Err(broken()),
        }
    }
}
