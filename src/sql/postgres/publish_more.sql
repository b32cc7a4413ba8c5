-- Adds keys to what a branch has published. Sent on another connection, because the branch is open.
--
-- $1 keys in hex; $2 which of them are held exclusively; $3 their tokens
-- $4 attempt
-- Returns nothing.
UPDATE palisade_branch SET
    resources = resources || $1::text[],
    exclusive = exclusive || $2::boolean[],
    tokens = tokens || $3::bigint[]
WHERE attempt = $4::uuid
