//! How edits are made, and how it is noticed that one was not.

use super::Edit;
use crate::error::{Error, ErrorKind, Result};

/// Edits on their way into the texts of one driver.
pub(super) struct Planting<'e> {
    edits: &'e [Edit],
    done: usize,
}

impl<'e> Planting<'e> {
    pub(super) fn of(edits: &'e [Edit]) -> Self {
        Self { edits, done: 0 }
    }

    /// The text as its edits leave it, in their order. An edited one stays in memory for ever,
    /// because drivers expect that of their texts; a test plants few.
    pub(super) fn edit(&mut self, name: &str, text: &'static str) -> Result<&'static str> {
        let mut edited = text.to_owned();
        let mine = || self.edits.iter().filter(|edit| edit.of == name);
        for Edit { fragment, instead, .. } in mine() {
            let times = edited.matches(fragment).count();
            if times != 1 {
                return Err(misuse(format!("{fragment:?} is {times} times in {name:?}, not once")));
            }
            edited = edited.replace(fragment, instead);
        }
        let count = mine().count();
        self.done += count;
        Ok(if count == 0 { text } else { Box::leak(edited.into_boxed_str()) })
    }

    /// All texts were shown.
    pub(super) fn end(self) -> Result<()> {
        if self.done == self.edits.len() {
            return Ok(());
        }
        Err(misuse("an edit is of a text that the driver does not have".to_owned()))
    }
}

fn misuse(detail: String) -> Error {
    Error::new(ErrorKind::Misuse, "plant", detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EDIT: Edit = Edit { of: "a", fragment: "one", instead: "two" };

    #[test]
    fn an_edit_replaces_what_it_names() {
        let mut planting =
            Planting::of(&[EDIT, Edit { fragment: "two", instead: "three", ..EDIT }]);
        assert_eq!(planting.edit("a", "just one").unwrap(), "just three");
        assert_eq!(planting.edit("b", "one and one").unwrap(), "one and one");
        planting.end().unwrap();
    }

    #[test]
    fn an_edit_that_cannot_be_made_is_an_error() {
        for text in ["two", "one and one"] {
            let error = Planting::of(&[EDIT]).edit("a", text).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Misuse);
        }
        let mut planting = Planting::of(&[EDIT]);
        planting.edit("b", "one").unwrap();
        assert_eq!(planting.end().unwrap_err().kind(), ErrorKind::Misuse);
    }
}
