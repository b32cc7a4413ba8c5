-- Gives up what the owner still holds.
--
-- KEYS: what was locked
-- ARGV: 1 owner
-- Returns: how many keys were still held
local released = 0
for _, key in ipairs(KEYS) do
  if redis.call('GET', key) == ARGV[1] then
    released = released + redis.call('DEL', key)
  end
end
return released
