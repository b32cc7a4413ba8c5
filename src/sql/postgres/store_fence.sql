-- Takes the fence rows of a transaction without a lock service, and issues its token.
--
-- $1 keys, sorted; $2 which of them are wanted exclusively; $3 tokens that must be exceeded
-- $4 owner
-- $5 attempt; NULL for a branch that only reads, which can write nothing from then on
-- $6, $7 lock_timeout and statement_timeout of what follows, in milliseconds, as text
-- Returns one row: the keys that were taken, in hex; the write_tx found at each; the id of this
-- transaction; its isolation level; the token. Fewer keys than asked for: somebody has just made
-- the row of one, so try again; or there is no token left.
--
-- The rows are the locks, so all that are there are locked, in key order, before the token is
-- computed: a locked row is read as it was committed last, whatever the snapshot says. A row that
-- is not there cannot be locked. Who makes it meanwhile may have written a higher token, and then
-- the insertion, which finds the row as it is, passes it over. One token for all keys, above what
-- any of them has seen and above the watermark, below which a row may be purged at any moment.
-- Never from a clock: what is in the rows is all that there is to be above.
WITH locked AS MATERIALIZED (
    SELECT f.write_token, f.read_token
    FROM palisade_fence AS f
    WHERE f.resource = ANY ($1::text[])
    ORDER BY f.resource COLLATE "C"
    FOR NO KEY UPDATE
), issued AS MATERIALIZED (
    SELECT 1 + least(9007199254740991, greatest(
        (SELECT max(floor) FROM unnest($3::bigint[]) AS k (floor)),
        (SELECT max(mark) FROM palisade_watermark),
        (SELECT max(greatest(write_token, read_token)) FROM locked)
    )) AS token
), passed AS (
    INSERT INTO palisade_fence AS f
        (resource, write_token, write_owner, write_tx, prior_tx, read_token, touched)
    SELECT
        k.resource,
        CASE WHEN k.exclusive THEN i.token ELSE 0 END,
        CASE WHEN k.exclusive THEN $4::uuid END,
        CASE WHEN k.exclusive THEN $5::uuid END,
        NULL,
        CASE WHEN k.exclusive THEN 0 ELSE i.token END,
        (date_part('epoch', clock_timestamp()) * 1000000)::bigint
    FROM unnest($1::text[], $2::boolean[]) AS k (resource, exclusive)
    CROSS JOIN issued AS i
    WHERE i.token < 9007199254740992
    ORDER BY k.resource COLLATE "C"
    ON CONFLICT (resource) DO UPDATE SET
        write_token = greatest(f.write_token, excluded.write_token),
        write_owner = coalesce(excluded.write_owner, f.write_owner),
        write_tx = coalesce(excluded.write_tx, f.write_tx),
        prior_tx = CASE WHEN excluded.write_tx IS NULL THEN f.prior_tx ELSE f.write_tx END,
        read_token = greatest(f.read_token, excluded.read_token),
        touched = greatest(f.touched + 1, excluded.touched)
    WHERE greatest(excluded.write_token, excluded.read_token)
        > greatest(f.write_token, f.read_token)
    RETURNING f.resource, f.prior_tx
)
SELECT
    coalesce(array_agg(encode(convert_to(resource, 'UTF8'), 'hex')), '{}'),
    coalesce(array_agg(prior_tx), '{}'),
    pg_current_xact_id()::text,
    current_setting('transaction_isolation'),
    (SELECT token FROM issued),
    set_config('lock_timeout', $6, true),
    set_config('statement_timeout', $7, true),
    set_config('transaction_read_only', ($5::uuid IS NULL)::text, true),
    set_config('synchronous_commit', CASE current_setting('synchronous_commit')
        WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, true)
FROM passed
