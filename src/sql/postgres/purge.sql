-- Deletes the fence rows that the watermark of an earlier round covers.
--
-- $1 the watermark as it was committed by an earlier round
-- $2 how many rows at most
--
-- A row that a branch has taken is passed over: it is about to carry a higher token.
DELETE FROM palisade_fence
WHERE resource IN (
    SELECT resource FROM palisade_fence
    WHERE greatest(write_token, read_token) <= $1
    LIMIT $2
    FOR UPDATE SKIP LOCKED
)
