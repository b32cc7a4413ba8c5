//! Two sides that take turns, and what is said of them.

use crate::window::Window;

/// A median with the least and the most that it stands for.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            0 => (values[middle - 1] + values[middle]) / 2.0,
            _ => values[middle],
        };
        Self { median, min: values[0], max: values[values.len() - 1] }
    }
}

/// Windows of ours and of a baseline, in pairs that ran one right after the other.
pub struct Pairs(Vec<(Window, Window)>);

/// Runs both sides once to warm up and then `COUNT` times, each time the other one first.
pub async fn alternate(
    mut ours: impl AsyncFnMut() -> Window,
    mut bare: impl AsyncFnMut() -> Window,
) -> Pairs {
    const COUNT: usize = 5;
    let mut pairs = Vec::with_capacity(COUNT);
    for turn in 0..=COUNT {
        let pair = if turn % 2 == 0 {
            let first = ours().await;
            (first, bare().await)
        } else {
            let first = bare().await;
            (ours().await, first)
        };
        // The first pair warmed up connections, caches and the server.
        if turn > 0 {
            pairs.push(pair);
        }
    }
    Pairs(pairs)
}

impl Pairs {
    /// How often ours was done for each time that the baseline was.
    pub fn ratio(&self) -> Spread {
        self.each(|ours, bare| ours.per_second() / bare.per_second())
    }

    pub fn ours(&self, what: impl Fn(&Window) -> f64) -> Spread {
        self.each(|ours, _| what(ours))
    }

    pub fn bare(&self, what: impl Fn(&Window) -> f64) -> Spread {
        self.each(|_, bare| what(bare))
    }

    pub fn each(&self, what: impl Fn(&Window, &Window) -> f64) -> Spread {
        Spread::of(self.0.iter().map(|(ours, bare)| what(ours, bare)))
    }
}
