-- Deletes what sessions have published that are gone. A start that this role may not see may be
-- alive.
DELETE FROM palisade_branch AS b
WHERE NOT EXISTS (
    SELECT FROM pg_stat_activity AS a
    WHERE a.pid = b.pid AND coalesce(a.backend_start = b.backend_start, true)
)
