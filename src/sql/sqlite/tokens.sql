-- What the fence rows of some keys hold, to tell a caller why it was refused, or whether what it
-- reads in this snapshot is newer than its tokens.
--
-- ?1 JSON array of [key, …]
-- Returns for each key: key, write_token, write_owner, read_token (NULL: no row), the watermark.
SELECT
    json_extract(k.value, '$[0]'), f.write_token, f.write_owner, f.read_token,
    (SELECT coalesce(max(mark), 0) FROM palisade_watermark)
FROM json_each(?1) AS k
LEFT JOIN palisade_fence AS f ON f.resource = json_extract(k.value, '$[0]')
ORDER BY 1
