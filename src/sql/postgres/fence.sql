-- Shows the tokens of a transaction to its fence rows, and takes the rows that let it pass.
--
-- $1 keys, sorted; $2 which of them are held exclusively; $3 their tokens
-- $4 owner
-- $5 attempt; NULL for a branch that only reads, which stamps no write_tx
-- $6, $7 lock_timeout and statement_timeout of what follows, in milliseconds, as text
-- Returns one row: the keys that passed, in hex; the write_tx found at each; the id of this
-- transaction; its isolation level. Fewer keys than asked for: stale.
--
-- A writer passes above both tokens, or with the same token and owner. A reader passes above the
-- write token, or beside its own. Tokens at or below the watermark never pass, whether or not their
-- row is still there: it may be purged at any moment. The aggregate takes in every row before the
-- settings change, so the short lock_timeout holds for all of them. A commit that is acknowledged
-- must be durable, so synchronous_commit is not left off. date_part counts in double precision,
-- which is exact enough and a good deal cheaper than the numeric of extract.
WITH passed AS (
    INSERT INTO palisade_fence AS f
        (resource, write_token, write_owner, write_tx, prior_tx, read_token, touched)
    SELECT
        k.resource,
        CASE WHEN k.exclusive THEN k.token ELSE 0 END,
        CASE WHEN k.exclusive THEN $4::uuid END,
        CASE WHEN k.exclusive THEN $5::uuid END,
        NULL,
        CASE WHEN k.exclusive THEN 0 ELSE k.token END,
        (date_part('epoch', clock_timestamp()) * 1000000)::bigint
    FROM unnest($1::text[], $2::boolean[], $3::bigint[]) AS k (resource, exclusive, token)
    WHERE k.token > (SELECT coalesce(max(mark), 0) FROM palisade_watermark)
    ORDER BY k.resource COLLATE "C"
    ON CONFLICT (resource) DO UPDATE SET
        write_token = greatest(f.write_token, excluded.write_token),
        write_owner = CASE WHEN excluded.write_token > 0
            THEN excluded.write_owner ELSE f.write_owner END,
        write_tx = coalesce(excluded.write_tx, f.write_tx),
        prior_tx = CASE WHEN excluded.write_tx IS NULL THEN f.prior_tx ELSE f.write_tx END,
        read_token = greatest(f.read_token, excluded.read_token),
        touched = greatest(f.touched + 1, excluded.touched)
    WHERE CASE
        WHEN excluded.write_token > 0 THEN
            (excluded.write_token > f.write_token AND excluded.write_token > f.read_token)
            OR (excluded.write_token = f.write_token AND f.write_owner = excluded.write_owner
                AND excluded.write_token >= f.read_token)
        ELSE
            excluded.read_token > f.write_token
            OR (excluded.read_token = f.write_token AND f.write_owner = $4::uuid)
        END
    RETURNING f.resource, f.prior_tx
)
SELECT
    coalesce(array_agg(encode(convert_to(resource, 'UTF8'), 'hex')), '{}'),
    coalesce(array_agg(prior_tx), '{}'),
    pg_current_xact_id()::text,
    current_setting('transaction_isolation'),
    set_config('lock_timeout', $6, true),
    set_config('statement_timeout', $7, true),
    set_config('synchronous_commit', CASE current_setting('synchronous_commit')
        WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, true)
FROM passed
