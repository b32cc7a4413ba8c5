-- Deletes the fence rows that the watermark of an earlier round covers.
--
-- ?1 the watermark as it was committed by an earlier round
-- ?2 how many rows at most
DELETE FROM palisade_fence
WHERE resource IN (
    SELECT resource FROM palisade_fence WHERE max(write_token, read_token) <= ?1 LIMIT ?2
)
