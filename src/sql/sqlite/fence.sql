-- Shows the tokens of a transaction to its fence rows, and takes the rows that let it pass.
--
-- ?1 JSON array of [key, exclusive (1 or 0), token], sorted by key
-- ?2 owner
-- ?3 attempt; NULL for a branch that only reads, which stamps no write_tx
-- Returns the keys that passed, each with the write_tx found there. Fewer rows than keys: stale.
--
-- A writer passes above both tokens, or with the same token and owner. A reader passes above the
-- write token, or beside its own. Tokens at or below the watermark never pass, whether or not their
-- row is still there: it may be purged at any moment.
INSERT INTO palisade_fence AS f
    (resource, write_token, write_owner, write_tx, prior_tx, read_token, touched)
SELECT
    json_extract(k.value, '$[0]'),
    iif(json_extract(k.value, '$[1]'), json_extract(k.value, '$[2]'), 0),
    iif(json_extract(k.value, '$[1]'), ?2, NULL),
    iif(json_extract(k.value, '$[1]'), ?3, NULL),
    NULL,
    iif(json_extract(k.value, '$[1]'), 0, json_extract(k.value, '$[2]')),
    CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)
FROM json_each(?1) AS k
WHERE json_extract(k.value, '$[2]') > (SELECT coalesce(max(mark), 0) FROM palisade_watermark)
ON CONFLICT (resource) DO UPDATE SET
    write_token = max(f.write_token, excluded.write_token),
    write_owner = iif(excluded.write_token > 0, excluded.write_owner, f.write_owner),
    write_tx = iif(excluded.write_tx IS NULL, f.write_tx, excluded.write_tx),
    prior_tx = iif(excluded.write_tx IS NULL, f.prior_tx, f.write_tx),
    read_token = max(f.read_token, excluded.read_token),
    touched = max(f.touched + 1, excluded.touched)
WHERE CASE
    WHEN excluded.write_token > 0 THEN
        (excluded.write_token > f.write_token AND excluded.write_token > f.read_token)
        OR (excluded.write_token = f.write_token AND f.write_owner IS excluded.write_owner
            AND excluded.write_token >= f.read_token)
    ELSE
        excluded.read_token > f.write_token
        OR (excluded.read_token = f.write_token AND f.write_owner IS ?2)
    END
RETURNING resource, prior_tx
