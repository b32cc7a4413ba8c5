-- Ends the session of an attempt, if it still has the attempt's transaction open.
--
-- $1 how the names of the attempt begin
-- Returns how many sessions were told to end. 0: the transaction has ended.
SELECT count(pg_terminate_backend(pid))
FROM pg_stat_activity
WHERE left(application_name, 25) = $1
