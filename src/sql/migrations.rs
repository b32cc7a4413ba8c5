//! The migrations of palisade's own tables, kept apart from the user's.

use std::borrow::Cow;

use sqlx::SqlSafeStr;
use sqlx::migrate::{Migrate, MigrateError, Migration, MigrationType};

use crate::error::{Error, ErrorKind};

use super::classify::classify;

/// Where palisade remembers which of its migrations ran. The user's migrator has its own table.
const TABLE: &str = "_palisade_migrations";

/// One embedded file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct File {
    pub(crate) version: i64,
    pub(crate) name: &'static str,
    pub(crate) sql: &'static str,
}

/// Runs those of `files` that did not run yet, in order.
///
/// The caller has begun a transaction in which no other process can do the same, and ends it: then
/// a run that fails or is dropped leaves nothing, and no lock, behind.
///
/// # Errors
/// [`ErrorKind::NotMigrated`] when what ran before is not what is embedded here.
pub(crate) async fn migrate<C: Migrate>(conn: &mut C, files: &[File]) -> Result<(), Error> {
    conn.ensure_migrations_table(TABLE).await.map_err(failed)?;
    let applied = conn.list_applied_migrations(TABLE).await.map_err(failed)?;
    if let Some(unknown) =
        applied.iter().find(|applied| files.iter().all(|file| file.version != applied.version))
    {
        return Err(failed(MigrateError::VersionMissing(unknown.version)));
    }
    for file in files {
        let migration = Migration::new(
            file.version,
            Cow::Borrowed(file.name),
            MigrationType::Simple,
            file.sql.into_sql_str(),
            true,
        );
        match applied.iter().find(|applied| applied.version == file.version) {
            Some(applied) if applied.checksum == migration.checksum => {}
            Some(_) => return Err(failed(MigrateError::VersionMismatch(file.version))),
            None => {
                conn.apply(TABLE, &migration).await.map_err(failed)?;
            }
        }
    }
    Ok(())
}

/// What a failed migration means to the caller.
fn failed(error: MigrateError) -> Error {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => {
            classify("migrate", error)
        }
        error @ (MigrateError::VersionMissing(_) | MigrateError::VersionMismatch(_)) => Error::new(
            ErrorKind::NotMigrated,
            "migrate",
            "the tables of palisade were made by another version; use that version or a newer one",
        )
        .with_source(error),
        error => Error::new(ErrorKind::Store, "migrate", "the migration failed").with_source(error),
    }
}
