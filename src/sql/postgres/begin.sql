-- Begins a branch and limits its session, so that a client that stops does not keep its rows.
--
-- {isolation}: nothing, or ISOLATION LEVEL …; {name}: see name.rs; {lock_ms}, {fence_ms} and
-- {lease_ms}
-- Returns nothing.
--
-- Only SET: a SELECT would take the snapshot of a REPEATABLE READ transaction before the fence,
-- which follows in the same message. The first two limits are those of the fence statement, which
-- puts the branch's own in their place.
BEGIN {isolation} READ WRITE;
SET LOCAL application_name = '{name}';
SET LOCAL lock_timeout = {lock_ms};
SET LOCAL statement_timeout = {fence_ms};
SET LOCAL idle_in_transaction_session_timeout = {lease_ms};
