-- Part of a script: how much longer than a deadline the key lives that it is written in.
--
-- KEYS, ARGV: none
-- Returns: nothing; it defines GRACE, in ms
--
-- Longer than any claim, so that a head whose TTL is as it was outlives a grant handed over now.
local GRACE = 30000
