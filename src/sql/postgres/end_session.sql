-- Ends the session of an attempt, if it still has the attempt's transaction open.
--
-- $1 attempt
-- Returns how many sessions were told to end. 0: the transaction has ended.
SELECT count(pg_terminate_backend(a.pid))
FROM palisade_branch AS b
JOIN pg_stat_activity AS a
    ON a.pid = b.pid AND a.backend_start = b.backend_start
    AND a.application_name = 'palisade:' || b.attempt
WHERE b.attempt = $1::uuid
