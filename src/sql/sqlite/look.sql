-- Touches fence rows to learn, under their lock, who wrote last. The caller rolls back.
--
-- ?1 JSON array of [key, …]
-- Returns for each key: key, write_token (-1: there was no row), write_tx, the watermark.
--
-- By the same upsert as the fence, so that a commit that is still on its way is waited for.
INSERT INTO palisade_fence AS f
    (resource, write_token, write_owner, write_tx, prior_tx, read_token, touched)
SELECT json_extract(k.value, '$[0]'), -1, NULL, NULL, NULL, 0, 0
FROM json_each(?1) AS k
WHERE true
ON CONFLICT (resource) DO UPDATE SET touched = f.touched + 1
RETURNING
    resource, write_token, write_tx,
    (SELECT coalesce(max(mark), 0) FROM palisade_watermark)
