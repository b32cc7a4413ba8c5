-- Begins a branch and limits its session, so that a client that stops does not keep its rows.
--
-- {isolation}: nothing, or ISOLATION LEVEL …; {name}: see name.rs; {lock_ms}, {fence_ms},
-- {lease_ms} and {unread_ms}
-- Returns nothing.
--
-- Only SET: a SELECT would take the snapshot of a REPEATABLE READ transaction before the fence,
-- which follows in the same message. The first two limits are those of the fence statement, which
-- puts the branch's own in their place. A session that waits for its client to read a result is not
-- idle, and no time-out of a statement ends it; the last limit does, on TCP.
BEGIN {isolation} READ WRITE;
SET LOCAL application_name = '{name}';
SET LOCAL lock_timeout = {lock_ms};
SET LOCAL statement_timeout = {fence_ms};
SET LOCAL idle_in_transaction_session_timeout = {lease_ms};
SET LOCAL tcp_user_timeout = {unread_ms};
