-- Looks for branches in the way, and ends the sessions of those whose time is over.
--
-- $1 keys in hex; $2 which of them are held exclusively; $3 their tokens
-- $4 owner; $5 how the names of the own attempt begin
-- $6 keys, $7 tokens and $8 owner as they stand in names: see name.rs
-- Returns for each branch in the way: a key in hex, whether it is the caller's own owner, whether
-- its session was told to end.
--
-- The caller's tokens come from the lock service. A lower token in a conflicting mode means that
-- the service has taken the key away from its holder, who was stopped or cut off. A session that
-- went on to other work is left alone: its name is compared here, right before the signal, and what
-- stands in a row is of this start of the session. A name does not say which fence it is about, but
-- who has an open branch has a lock on its table. What is in a name is held exclusively, so it
-- conflicts with every mode.
WITH named AS (
    SELECT a.pid, min(m.resource) AS resource, substr(a.application_name, 27, 11) = $8 AS own
    FROM pg_stat_activity AS a
    JOIN unnest($1::text[], $6::text[], $7::text[]) AS m (resource, key, token)
        ON m.key IN (
            substr(a.application_name, 47, 5),
            substr(a.application_name, 52, 5),
            substr(a.application_name, 57, 5)
        )
    JOIN pg_locks AS l
        ON l.pid = a.pid AND l.relation = 'palisade_fence'::regclass AND l.database = a.datid
        AND l.mode = 'RowExclusiveLock'
    WHERE a.datname = current_database() AND a.application_name LIKE 'palisade:%:%'
        AND left(a.application_name, 25) <> $5
        AND (
            substr(a.application_name, 27, 11) = $8
            OR substr(a.application_name, 38, 9) COLLATE "C" < m.token
        )
    GROUP BY a.pid, a.application_name
), written AS (
    SELECT a.pid, min(t.resource) AS resource, b.owner = $4::uuid AS own
    FROM palisade_branch AS b
    JOIN pg_stat_activity AS a
        ON a.pid = b.pid AND a.backend_start = b.backend_start
        AND left(a.application_name, 25)
            = 'palisade:' || right(replace(b.attempt::text, '-', ''), 16)
    CROSS JOIN unnest(b.resources, b.exclusive, b.tokens) AS t (resource, exclusive, token)
    JOIN unnest($1::text[], $2::boolean[], $3::bigint[]) AS m (resource, exclusive, token)
        ON m.resource = t.resource
    WHERE left(a.application_name, 25) <> $5
        AND (b.owner = $4::uuid OR (t.token < m.token AND (t.exclusive OR m.exclusive)))
    GROUP BY a.pid, b.owner
)
SELECT resource, own, CASE WHEN own THEN false ELSE pg_terminate_backend(pid) END
FROM (SELECT * FROM named UNION SELECT * FROM written) AS found
