-- Moves the watermark: up to the highest token among rows that nobody touched since ?1, but below
-- every token of a row that was touched since.
--
-- ?1 microseconds since 1970
-- ?2 now, in microseconds since 1970
UPDATE palisade_watermark SET
    mark = max(palisade_watermark.mark, next.mark),
    advanced = iif(next.mark > palisade_watermark.mark, ?2, palisade_watermark.advanced)
FROM (
    SELECT coalesce(max(max(write_token, read_token)), 0) AS mark
    FROM palisade_fence
    WHERE touched < ?1
      AND max(write_token, read_token) < (
          SELECT coalesce(min(max(write_token, read_token)), 9007199254740992)
          FROM palisade_fence WHERE touched >= ?1
      )
) AS next
