-- Gives up a grant: the way that is taken when nobody waits and nobody shares.
--
-- KEYS: heads, in the order of the wants
-- ARGV: 1 owner and request, 2 modes: x or s, one for all keys or one each
-- Returns: 1 released | 0 gone | corrupt, Redis key
--
-- A head that begins as the fast way of acquire wrote it belongs to this request alone and has
-- neither waiters nor metadata, whatever its token. Runs with allow-oom, as renew and cancel do:
-- what is held must be given up when memory is full.
local call = redis.call
local v = call('MGET', unpack(KEYS))
local modes = ARGV[2]
local n = #KEYS
local mine = true
for i = 1, n do
  local m = #modes == 1 and modes or string.sub(modes, i, i)
  if not v[i] or string.sub(v[i], 1, 51) ~= '-' .. m .. ARGV[1] .. ':' then
    mine = false
    break
  end
end
if mine then
  call('DEL', unpack(KEYS))
  return 1
end
local t = call('TIME')
local now = t[1] * 1000000 + t[2]
local count
