-- Gives up a grant: the way that is taken when nobody waits and nobody shares.
--
-- KEYS: heads, in the order of the wants
-- ARGV: 1 owner and request, 2 modes: x or s, one for all keys or one each
-- Returns: 1 released | 0 gone | corrupt, Redis key
--
-- Runs with allow-oom, as renew and cancel do: what is held must be given up when memory is full.
-- One key is read by GET, which costs half of MGET; MGET shows a foreign type as missing.
local call = redis.call
-- include grace.lua
local id, modes = ARGV[1], ARGV[2]
local from, to = 1, #KEYS
local v
if to == 1 then
  local one = redis.pcall('GET', KEYS[1])
  v = {type(one) == 'string' and one}
else
  v = call('MGET', unpack(KEYS))
end
-- include mine.lua
if mine then
  call('DEL', unpack(KEYS))
  return 1
end
local t = call('TIME')
local now = t[1] * 1000000 + t[2]
local count, mark
