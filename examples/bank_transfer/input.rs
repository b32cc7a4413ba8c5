//! The transfers to run, and what must come of them.

use std::collections::BTreeMap;
use std::path::Path;

use crate::Result;

/// A line of the file. Its memo is for people.
#[derive(Clone, Debug)]
pub struct Transfer {
    pub id: i64,
    pub from: String,
    pub to: String,
    pub amount_cents: i64,
}

impl Transfer {
    /// What the transfer locks.
    pub fn keys(&self) -> [String; 2] {
        [&self.from, &self.to].map(|account| format!("account:{account}"))
    }
}

/// What a bank has on its books.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Books {
    pub balances: BTreeMap<String, i64>,
    pub applied: usize,
    pub refused: usize,
}

#[derive(Debug)]
pub struct Input {
    pub opening: BTreeMap<String, i64>,
    pub transfers: Vec<Transfer>,
}

impl Input {
    /// Reads the first `limit` transfers of `file`, and `accounts.csv` beside it.
    pub fn read(file: &Path, limit: Option<usize>) -> Result<Self> {
        let accounts = records(&file.with_file_name("accounts.csv"))?;
        let opening = accounts.map(|fields| opening(&fields?)).collect::<Result<_>>()?;
        let transfers = records(file)?.take(limit.unwrap_or(usize::MAX));
        let transfers = transfers.map(|fields| transfer(&fields?)).collect::<Result<_>>()?;
        let input = Self { opening, transfers };
        input.check()?;
        Ok(input)
    }

    /// Runs the transfers one after the other: what any number of workers must arrive at.
    pub fn replay(&self) -> Books {
        let mut books = Books { balances: self.opening.clone(), ..Books::default() };
        for Transfer { from, to, amount_cents, .. } in &self.transfers {
            books.applied += 1;
            match books.balances.get_mut(from) {
                Some(balance) if *balance >= *amount_cents => *balance -= amount_cents,
                _ => {
                    books.refused += 1;
                    continue;
                }
            }
            *books.balances.entry(to.clone()).or_default() += amount_cents;
        }
        books
    }

    /// Refuses a file whose outcome depends on the order of its transfers: workers keep none.
    ///
    /// An account must have the funds for all that it sends from the start, or for none of it ever.
    fn check(&self) -> Result<()> {
        let (mut sent, mut least, mut received) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for Transfer { id, from, to, amount_cents } in &self.transfers {
            if from == to || *amount_cents <= 0 {
                return Err(
                    format!("transfer {id}: from an account to itself, or of nothing").into()
                );
            }
            if let Some(stranger) = [from, to].iter().find(|a| !self.opening.contains_key(**a)) {
                return Err(format!("transfer {id}: {stranger:?} is not in accounts.csv").into());
            }
            *sent.entry(from).or_insert(0) += amount_cents;
            *received.entry(to).or_insert(0) += amount_cents;
            let smallest = least.entry(from).or_insert(*amount_cents);
            *smallest = *amount_cents.min(smallest);
        }
        for (account, sent) in sent {
            let opening = self.opening[account];
            let most = opening + received.get(account).copied().unwrap_or(0);
            if opening < sent && most >= least[account] {
                let why = "whether its transfers are refused would depend on their order";
                return Err(format!("account {account:?} opens with {opening}: {why}").into());
            }
        }
        Ok(())
    }
}

fn opening(fields: &[String]) -> Result<(String, i64)> {
    match fields {
        [account, cents] => Ok((account.clone(), number(cents)?)),
        _ => Err(format!("account,opening_cents expected, found {fields:?}").into()),
    }
}

fn transfer(fields: &[String]) -> Result<Transfer> {
    match fields {
        [id, from, to, cents, _memo @ ..] => Ok(Transfer {
            id: number(id)?,
            from: from.clone(),
            to: to.clone(),
            amount_cents: number(cents)?,
        }),
        _ => Err(format!("id,from,to,amount_cents,memo expected, found {fields:?}").into()),
    }
}

fn number(text: &str) -> Result<i64> {
    text.parse().map_err(|error| format!("{text:?} is no number: {error}").into())
}

/// The records of a CSV file below its header.
fn records(file: &Path) -> Result<impl Iterator<Item = Result<Vec<String>>> + use<>> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| format!("cannot read {}: {error}", file.display()))?;
    let lines: Vec<String> = text.lines().skip(1).map(str::to_owned).collect();
    Ok(lines.into_iter().filter(|line| !line.is_empty()).map(|line| fields(&line)))
}

/// The fields of a record; one in quotes may hold commas, and quotes that are doubled.
fn fields(record: &str) -> Result<Vec<String>> {
    let (mut fields, mut quoted) = (vec![String::new()], false);
    let mut chars = record.chars().peekable();
    while let Some(char) = chars.next() {
        let field = fields.last_mut().ok_or("a record has a field")?;
        match char {
            '"' if quoted && chars.next_if_eq(&'"').is_some() => field.push('"'),
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            char => field.push(char),
        }
    }
    if quoted { Err(format!("a quote is open in {record:?}").into()) } else { Ok(fields) }
}
