-- Takes a row for each key, and gives each the next token.
--
-- $1 keys, sorted
-- Returns the keys with their tokens.
INSERT INTO hand_fence (resource, token)
SELECT resource, 1 FROM unnest($1::text[]) AS k (resource)
ON CONFLICT (resource) DO UPDATE SET token = hand_fence.token + 1
RETURNING resource, token
