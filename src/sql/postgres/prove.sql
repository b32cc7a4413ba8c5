-- Fails unless the open transaction is the one that was fenced. Sent in one message with its end.
--
-- {truth}: a condition that only holds in that transaction. The one of a branch that writes has a
-- parameter, the id that the fence returned, because it is prepared.
-- Returns 0.
--
-- A COMMIT in a failed transaction answers ROLLBACK without an error, and a COMMIT that the program
-- sent itself leaves what follows unfenced; this notices both. The cast fails with the text in it;
-- the text is not constant, or it would be evaluated whatever the condition says.
SELECT CASE WHEN {truth} THEN 0 ELSE ('palisade: not the fenced transaction but '
    || coalesce(pg_current_xact_id_if_assigned()::text, 'none'))::integer END;
