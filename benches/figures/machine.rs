//! What it was measured on.

use std::fs;
use std::process::Command;
use std::time::Instant;

/// Clock ticks a second, in which the kernel counts for `/proc`.
const TICKS: f64 = 100.0;

/// Watches who else uses the machine: their work is in every figure.
pub struct Watch {
    start: Instant,
    all: f64,
    ours: f64,
}

impl Watch {
    pub fn start() -> Self {
        Self { start: Instant::now(), all: all_busy(), ours: ours_busy() }
    }

    pub fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// Which part of the machine went to others since: neither to this process nor to the servers
    /// that it started and has stopped.
    pub fn others(&self) -> f64 {
        let others = (all_busy() - self.all) - (ours_busy() - self.ours);
        (others / TICKS / self.seconds() / cores() as f64).max(0.0)
    }
}

/// Ticks in which any processor worked for anybody, or was withheld by the host.
fn all_busy() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let cpu = stat.lines().next().unwrap_or_default();
    let columns: Vec<f64> = cpu.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal
    columns.iter().take(8).sum::<f64>() - columns.iter().skip(3).take(2).sum::<f64>()
}

/// Ticks of this process and of its children that have ended.
fn ours_busy() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let columns = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    columns.skip(11).take(4).filter_map(|ticks| ticks.parse::<f64>().ok()).sum()
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Prints the facts without which no figure means anything.
pub fn print(quick: bool) {
    let model = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = model.lines().find(|line| line.starts_with("model name"));
    let model = model.and_then(|line| line.split(": ").nth(1)).unwrap_or("unknown processor");
    let commit = output("git", &["describe", "--always", "--dirty", "--abbrev=9"]);
    let redis = output("redis-server", &["--version"]);
    let redis = redis.split_whitespace().find_map(|word| word.strip_prefix("v="));
    let windows = if quick { "short windows (--quick)" } else { "full windows" };
    println!("palisade {commit}, {windows}");
    println!("{} cores, {model}", cores());
    println!("redis-server {} on loopback, nothing persisted", redis.unwrap_or("?"));
    println!("multi-thread runtime with 2 workers unless said otherwise");
}

/// What a program prints, or nothing where it is not to be had.
fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.unwrap_or_default()
}
