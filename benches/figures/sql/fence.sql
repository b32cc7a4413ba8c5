-- Lets a transaction pass that has a newer token than all before it, and changes a row for each key
-- that let it pass.
--
-- $1 keys, sorted; $2 token
INSERT INTO hand_fence (resource, token)
SELECT resource, $2 FROM unnest($1::text[]) AS k (resource)
ON CONFLICT (resource) DO UPDATE SET token = excluded.token
WHERE hand_fence.token < excluded.token
