-- Remembers the life of the server. In one that was not seen before it puts a word in the place of
-- each token counter: then no script grants anything, and none changes it, until the word expires.
--
-- KEYS: 1 where the life is kept, 2.. token counters
-- ARGV: 1 run id of the server, 2 ms for which leases of an earlier life may still run, 3 the word
-- Returns: 1 if the life is a new one | 0 | corrupt, Redis key
--
-- The counter then begins with the clock again. One that is not ours is left as it is.
local life = redis.pcall('GET', KEYS[1])
if type(life) == 'table' then return {'corrupt', KEYS[1]} end
if life == ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1])
for i = 2, #KEYS do
  local count = redis.pcall('GET', KEYS[i])
  local ours = not count or type(count) == 'string' and string.find(count, '^%d+!?%d*$')
  if ours and ARGV[2] ~= '0' then redis.call('SET', KEYS[i], ARGV[3], 'PX', ARGV[2]) end
end
return 1
