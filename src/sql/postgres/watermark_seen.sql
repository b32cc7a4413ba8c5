-- Notes when the watermark was known to be committed.
--
-- Returns nothing. In a statement of its own, after the one that moved the mark has committed: a
-- purge that was stopped in between must not make the mark look older than it is.
UPDATE palisade_watermark
SET advanced = (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
WHERE advanced IS NULL
