-- Takes all keys or none, and draws a fencing token.
--
-- KEYS: what to lock
-- ARGV: 1 owner, 2 lease in ms
-- Returns: token | nil when somebody has one of the keys
for i, key in ipairs(KEYS) do
  if not redis.call('SET', key, ARGV[1], 'NX', 'PX', ARGV[2]) then
    for j = 1, i - 1 do
      redis.call('DEL', KEYS[j])
    end
    return false
  end
end
return redis.call('INCR', 'fence')
