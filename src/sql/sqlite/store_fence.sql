-- Takes the fence rows of a transaction without a lock service, and issues its token.
--
-- ?1 JSON array of [key, exclusive (1 or 0), a token that must be exceeded], sorted by key
-- ?2 owner
-- ?3 attempt
-- Returns the keys, each with the write_tx found there and the token. No rows: no token is left.
--
-- The transaction has the write lock of the database, so nobody can come between the tokens that
-- are read here and the one that is written. One token for all keys, above what any of them has
-- seen and above the watermark, below which a row may be purged at any moment.
WITH issued AS MATERIALIZED (
    SELECT 1 + min(9007199254740991, max(
        (SELECT coalesce(max(json_extract(value, '$[2]')), 0) FROM json_each(?1)),
        (SELECT coalesce(max(mark), 0) FROM palisade_watermark),
        (SELECT coalesce(max(max(f.write_token, f.read_token)), 0)
            FROM json_each(?1) AS k
            JOIN palisade_fence AS f ON f.resource = json_extract(k.value, '$[0]'))
    )) AS token
)
INSERT INTO palisade_fence AS f
    (resource, write_token, write_owner, write_tx, prior_tx, read_token, touched)
SELECT
    json_extract(k.value, '$[0]'),
    iif(json_extract(k.value, '$[1]'), i.token, 0),
    iif(json_extract(k.value, '$[1]'), ?2, NULL),
    iif(json_extract(k.value, '$[1]'), ?3, NULL),
    NULL,
    iif(json_extract(k.value, '$[1]'), 0, i.token),
    CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)
FROM json_each(?1) AS k
CROSS JOIN issued AS i
WHERE i.token < 9007199254740992
ON CONFLICT (resource) DO UPDATE SET
    write_token = max(f.write_token, excluded.write_token),
    write_owner = coalesce(excluded.write_owner, f.write_owner),
    write_tx = coalesce(excluded.write_tx, f.write_tx),
    prior_tx = iif(excluded.write_tx IS NULL, f.prior_tx, f.write_tx),
    read_token = max(f.read_token, excluded.read_token),
    touched = max(f.touched + 1, excluded.touched)
RETURNING resource, prior_tx, max(write_token, read_token)
