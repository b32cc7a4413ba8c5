-- Looks for branches in the way, and ends the sessions of those whose time is over.
--
-- $1 keys in hex; $2 which of them are held exclusively; $3 their tokens
-- $4 owner; $5 attempt
-- Returns for each branch in the way: a key in hex, whether it is the caller's own owner, whether
-- its session was told to end.
--
-- The caller's tokens come from the lock service. A lower token in a conflicting mode means that
-- the service has taken the key away from its holder, who was stopped or cut off. Pid, start and
-- name are compared again here, right before the signal: a session that went on to other work is
-- left alone.
SELECT
    c.resource,
    b.owner = $4::uuid,
    CASE WHEN b.owner = $4::uuid THEN false ELSE pg_terminate_backend(a.pid) END
FROM palisade_branch AS b
JOIN pg_stat_activity AS a
    ON a.pid = b.pid AND a.backend_start = b.backend_start
    AND a.application_name = 'palisade:' || b.attempt
CROSS JOIN LATERAL (
    SELECT min(t.resource) AS resource
    FROM unnest(b.resources, b.exclusive, b.tokens) AS t (resource, exclusive, token)
    JOIN unnest($1::text[], $2::boolean[], $3::bigint[]) AS m (resource, exclusive, token)
        ON m.resource = t.resource
    WHERE b.owner = $4::uuid OR (t.token < m.token AND (t.exclusive OR m.exclusive))
) AS c
WHERE b.attempt <> $5::uuid AND c.resource IS NOT NULL
