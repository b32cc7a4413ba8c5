-- Touches fence rows to learn, under their lock, who wrote last. The caller rolls back.
--
-- $1 keys, sorted
-- Returns for each key: key, write_token (-1: there was no row), write_tx, the watermark.
--
-- By the same upsert as the fence: a SELECT, plain or FOR UPDATE, misses a COMMIT that is still on
-- its way, the latter where the row is new.
INSERT INTO palisade_fence AS f
    (resource, write_token, write_owner, write_tx, prior_tx, read_token, touched)
SELECT k.resource, -1, NULL, NULL, NULL, 0, 0
FROM unnest($1::text[]) AS k (resource)
ORDER BY k.resource COLLATE "C"
ON CONFLICT (resource) DO UPDATE SET touched = f.touched + 1
RETURNING
    f.resource::text, f.write_token, f.write_tx,
    (SELECT coalesce(max(mark), 0) FROM palisade_watermark)
