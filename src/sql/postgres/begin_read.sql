-- Commits the stamp of a branch that only reads, and begins the snapshot that it reads.
--
-- {attempt}: UUID; {statement_ms}, {lease_ms}
-- Returns nothing.
--
-- The name differs from that of a branch that writes: this one holds no row that anybody waits for.
COMMIT;
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SET LOCAL application_name = 'palisade-read:{attempt}';
SET LOCAL statement_timeout = {statement_ms};
SET LOCAL idle_in_transaction_session_timeout = {lease_ms};
