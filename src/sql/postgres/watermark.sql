-- Moves the watermark: up to the highest token among rows that nobody touched since $1, but below
-- every token of a row that was touched since.
--
-- $1 microseconds since 1970
-- Returns nothing. When it was moved is noted afterwards, see watermark_seen.sql.
UPDATE palisade_watermark AS w SET
    mark = greatest(w.mark, next.mark),
    advanced = CASE WHEN next.mark > w.mark THEN NULL ELSE w.advanced END
FROM (
    SELECT coalesce(max(greatest(write_token, read_token)), 0) AS mark
    FROM palisade_fence
    WHERE touched < $1
      AND greatest(write_token, read_token) < (
          SELECT coalesce(min(greatest(write_token, read_token)), 9007199254740992)
          FROM palisade_fence WHERE touched >= $1
      )
) AS next
