-- What the fence rows of some keys hold, to tell a caller why it was refused, or whether what it
-- reads in this snapshot is newer than its tokens.
--
-- $1 keys
-- Returns for each key: key, write_token, write_owner, read_token (NULL: no row), the watermark.
SELECT
    k.resource, f.write_token, f.write_owner, f.read_token,
    (SELECT coalesce(max(mark), 0) FROM palisade_watermark)
FROM unnest($1::text[]) AS k (resource)
LEFT JOIN palisade_fence AS f ON f.resource = k.resource
ORDER BY k.resource COLLATE "C"
