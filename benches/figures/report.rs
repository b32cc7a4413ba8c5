//! The table on the terminal and the summary beside the build.

use std::fs::{self, File};
use std::io::{IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use crate::machine::Watch;
use crate::pairs::Spread;

/// What a figure should reach.
#[derive(Clone, Copy, Debug)]
pub enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

impl Goal {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(goal) => value >= goal,
            Self::AtMost(goal) => value <= goal,
        }
    }

    fn number(self) -> f64 {
        let (Self::AtLeast(goal) | Self::AtMost(goal)) = self;
        goal
    }

    fn text(self) -> String {
        let sign = if matches!(self, Self::AtLeast(_)) { '≥' } else { '≤' };
        format!("{sign} {}", self.number())
    }
}

/// One measured number: under which conditions, and against which goal.
#[derive(Debug)]
pub struct Figure {
    name: &'static str,
    conditions: Vec<(&'static str, Value)>,
    value: Spread,
    goal: Option<Goal>,
    beside: Vec<(&'static str, f64)>,
}

impl Figure {
    pub fn new(name: &'static str, value: Spread) -> Self {
        Self { name, conditions: Vec::new(), value, goal: None, beside: Vec::new() }
    }

    pub fn at(mut self, what: &'static str, value: impl Into<Value>) -> Self {
        self.conditions.push((what, value.into()));
        self
    }

    pub fn goal(mut self, goal: Goal) -> Self {
        self.goal = Some(goal);
        self
    }

    /// A number for the summary, which the table leaves out.
    pub fn beside(mut self, what: &'static str, value: f64) -> Self {
        self.beside.push((what, value));
        self
    }

    /// Judged by what is shown: more digits would be noise.
    fn is_met(&self) -> Option<bool> {
        let shown: f64 = short(self.value.median).parse().expect("a number");
        self.goal.map(|goal| goal.is_met(shown))
    }

    /// `1 key, 64 tasks, current_thread`; `10000 leases, lease 10 s`
    fn conditions(&self) -> String {
        let text = |(what, value): &(&str, Value)| match (value, what.strip_suffix("_s")) {
            (Value::String(text), _) => text.clone(),
            (number, Some(what)) => format!("{what} {number} s"),
            (number, _) if *number == json!(1) => format!("1 {}", what.trim_end_matches('s')),
            (number, _) => format!("{number} {what}"),
        };
        self.conditions.iter().map(text).collect::<Vec<_>>().join(", ")
    }

    fn json(&self) -> String {
        let Spread { median, min, max } = self.value;
        let mut fields = vec![("figure", json!(self.name))];
        fields.extend(self.conditions.iter().cloned());
        fields.push(("value", json!(rounded(median))));
        if min < max {
            fields.extend([("min", json!(rounded(min))), ("max", json!(rounded(max)))]);
        }
        if let (Some(goal), Some(met)) = (self.goal, self.is_met()) {
            fields.extend([("goal", json!(goal.number())), ("met", json!(met))]);
        }
        fields.extend(self.beside.iter().map(|(what, value)| (*what, json!(rounded(*value)))));
        let field = |(what, value): &(&str, Value)| format!("{}:{value}", json!(what));
        format!("{{{}}}", fields.iter().map(field).collect::<Vec<_>>().join(","))
    }
}

/// Prints figures as they come.
pub struct Report {
    summary: File,
    path: PathBuf,
    working: ProgressBar,
    last: &'static str,
    note: Option<String>,
    colours: bool,
    /// Of each figure with a goal: how often it was met, and measured.
    tally: Vec<(&'static str, usize, usize)>,
}

impl Report {
    pub fn open() -> Self {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the build directory");
        let path = target.join("bench").join("summary.jsonl");
        fs::create_dir_all(path.parent().expect("it has one")).expect("a place for the summary");
        let summary = File::create(&path).expect("the summary can be written");
        let working = ProgressBar::new_spinner();
        working.set_style(ProgressStyle::with_template("{spinner} {msg}").expect("a template"));
        working.enable_steady_tick(Duration::from_millis(200));
        let colours = std::io::stdout().is_terminal();
        Self { summary, path, working, last: "", note: None, colours, tally: Vec::new() }
    }

    /// Says what is being measured, where somebody is looking on.
    pub fn measuring(&self, what: String) {
        self.working.set_message(what);
    }

    /// Says what must be known to read the figures that follow.
    pub fn note(&mut self, text: String) {
        self.note = Some(text);
    }

    pub fn add(&mut self, figures: impl IntoIterator<Item = Figure>) {
        for figure in figures {
            writeln!(self.summary, "{}", figure.json()).expect("the summary can be written");
            if let Some(met) = figure.is_met() {
                self.count(figure.name, met);
            }
            self.working.suspend(|| self.row(&figure));
            (self.last, self.note) = (figure.name, None);
        }
    }

    fn count(&mut self, name: &'static str, met: bool) {
        match self.tally.iter_mut().find(|(counted, ..)| *counted == name) {
            Some((_, times, of)) => (*times, *of) = (*times + usize::from(met), *of + 1),
            None => self.tally.push((name, usize::from(met), 1)),
        }
    }

    fn row(&self, figure: &Figure) {
        if self.last.is_empty() {
            let (figure, conditions, value) = ("figure", "conditions", "median");
            println!("\n{figure:<21} {conditions:<36} {value:>8}  least to most   goal");
        }
        if self.last != figure.name {
            println!("{}", "─".repeat(99));
            self.note.iter().for_each(|note| println!("{note}"));
        }
        let name = if self.last == figure.name { "" } else { figure.name };
        let Spread { median, min, max } = figure.value;
        let spread = match min < max {
            true => format!("{} to {}", short(min), short(max)),
            false => String::new(),
        };
        let goal = figure.goal.map(Goal::text).unwrap_or_default();
        let verdict = match figure.is_met() {
            Some(true) => self.coloured("32", "met"),
            Some(false) => self.coloured("31", "missed"),
            None => String::new(),
        };
        let row = format!(
            "{name:<21} {:<36} {:>8}  {spread:<15} {goal:<8} {verdict}",
            figure.conditions(),
            short(median),
        );
        println!("{}", row.trim_end());
    }

    fn coloured(&self, colour: &str, text: &str) -> String {
        if self.colours { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub fn close(self, watch: &Watch) {
        self.working.finish_and_clear();
        let (seconds, others) = (watch.seconds(), watch.others() * 100.0);
        println!("\n{seconds:.0} s, in which others used {others:.0} % of the machine; goals met:");
        for (name, times, of) in &self.tally {
            println!("  {name:<21} {times} of {of}");
        }
        println!("summary: {}", self.path.display());
    }
}

/// As many digits as a reader wants.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        0.0 => 0,
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// Four decimals are more than any figure is good for.
fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}
