//! A connection on loan from its pool, with everything that must be put right before it goes back.
//!
//! A connection goes back only when its last transaction is proven to have ended. Dropped in any
//! other state it goes to the driver, which closes it or proves it.

use sqlx::pool::PoolConnection;

use crate::error::{Error, ErrorKind, Result};

use super::database::SqlDatabase;

/// A connection that is guarded from before its BEGIN is sent.
pub struct Session<DB: SqlDatabase> {
    conn: Option<PoolConnection<DB>>,
    /// What else goes back with the connection.
    pub(super) loan: DB::Loan,
}

impl<DB: SqlDatabase> Session<DB> {
    /// Guards a connection from now on.
    pub(super) fn new(conn: PoolConnection<DB>, loan: DB::Loan) -> Self {
        Self { conn: Some(conn), loan }
    }

    /// The connection.
    pub(super) fn conn(&mut self) -> Result<&mut DB::Connection> {
        self.parts().map(|(conn, _)| conn)
    }

    /// The connection and what goes back with it.
    pub(super) fn parts(&mut self) -> Result<(&mut DB::Connection, &DB::Loan)> {
        match &mut self.conn {
            Some(conn) => Ok((&mut **conn, &self.loan)),
            None => Err(Error::new(ErrorKind::Misuse, "statement", "the branch has ended")),
        }
    }

    /// Gives the connection back: its transaction has ended, which is proven.
    pub(super) fn release(mut self) {
        drop(self.conn.take());
    }
}

impl<DB: SqlDatabase> Drop for Session<DB> {
    fn drop(&mut self) {
        if let Some(conn) = self.conn.take() {
            DB::discard(conn, std::mem::take(&mut self.loan));
        }
    }
}
