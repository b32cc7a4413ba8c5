-- Shows to other sessions what this one is about to work on. Sent in one message with BEGIN.
--
-- {attempt}, {owner}: UUIDs; {resources}: array of keys in hex; {exclusive}, {tokens}: arrays. The
-- simple protocol takes no parameters, and none of these texts can hold a quote.
-- Returns nothing.
--
-- Committed before the branch begins, or nobody could see it while the branch is open. Losing it in
-- a crash is harmless, because a crash ends the session; so nothing is waited for.
BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE;
SET LOCAL synchronous_commit = off;
INSERT INTO palisade_branch (pid, backend_start, attempt, owner, resources, exclusive, tokens)
SELECT
    pg_backend_pid(), a.backend_start, '{attempt}', '{owner}',
    '{resources}', '{exclusive}', '{tokens}'
FROM pg_stat_get_activity(pg_backend_pid()) AS a
ON CONFLICT (pid) DO UPDATE SET
    backend_start = excluded.backend_start,
    attempt = excluded.attempt,
    owner = excluded.owner,
    resources = excluded.resources,
    exclusive = excluded.exclusive,
    tokens = excluded.tokens;
COMMIT;
