-- Publishes keys that were added to an open branch. Sent on another connection, because the branch
-- is open; a branch whose name says what it had so far has no row yet.
--
-- $1 keys in hex; $2 which of them are held exclusively; $3 their tokens
-- $4 attempt; $5 how the names of the attempt begin; $6 owner
-- Returns nothing.
INSERT INTO palisade_branch AS b
    (pid, backend_start, attempt, owner, resources, exclusive, tokens)
SELECT a.pid, a.backend_start, $4::uuid, $6::uuid, $1::text[], $2::boolean[], $3::bigint[]
FROM pg_stat_activity AS a
WHERE left(a.application_name, 25) = $5 AND a.backend_start IS NOT NULL
ON CONFLICT (pid) DO UPDATE SET
    backend_start = excluded.backend_start,
    attempt = excluded.attempt,
    owner = excluded.owner,
    resources = excluded.resources
        || CASE WHEN b.attempt = excluded.attempt THEN b.resources ELSE '{}' END,
    exclusive = excluded.exclusive
        || CASE WHEN b.attempt = excluded.attempt THEN b.exclusive ELSE '{}' END,
    tokens = excluded.tokens
        || CASE WHEN b.attempt = excluded.attempt THEN b.tokens ELSE '{}' END
