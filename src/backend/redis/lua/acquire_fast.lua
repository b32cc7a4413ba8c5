-- Asks for all keys of a set: the way that is taken when nobody is in the way.
--
-- KEYS: 1 token counter, 2.. heads, in the order of the wants
-- ARGV: 1 owner and request, 2 lease in ms, 3 modes: x or s, one for all keys or one each,
--       4 floor (0 = none), 5 what only the slow way needs, 6 metadata (missing = none)
-- Returns: a token, which all keys got, or an array:
--       granted, tokens as number*times,..., how many are reserved (missing = 1) |
--       queued, position, ask again in µs |
--       busy, index of the want, 1 if somebody waits, owners... | upgrade, index | limit, index |
--       cancelled | corrupt, Redis key
--
-- Every call costs more than all of the Lua around it, so there are as few as can be: the token is
-- the clock unless the counter is ahead of it, so the counter is written and read in one call, and
-- put back if it is not ours. One that cancel.lua has marked says that there are tombstones. What
-- is refused may leave the counter higher, though not by its floor: tokens only have to grow.
-- Refused by Redis as a whole when memory is full: the script has no allow-oom flag.
local call = redis.call
-- include grace.lua
local id, lease, modes = ARGV[1], ARGV[2], ARGV[3]
local t = call('TIME')
local now = t[1] * 1000000 + t[2]
local last = now + 86400000000
local token = now -- the floor of a request is taken in where it is granted
local stamp = string.format('%d', token)
local old = redis.pcall('SET', KEYS[1], stamp, 'KEEPTTL', 'GET')
local count, mark = 0, ''
local good = true
if old then
  local digits, marked = type(old) == 'string' and old or '', nil
  if not string.find(digits, '^%d+$') then
    digits, marked = string.match(digits, '^(%d+)!(%d*)$')
  end
  good = digits and #digits < 17
  if good then
    count = digits + 0
    if marked and (tonumber(marked) or 0) >= now then mark = '!' .. marked end
    if count >= token or mark ~= '' then
      token = math.max(now, count + 1)
      good = token <= last and token < 9007199254740992
      stamp = string.format('%d', token)
      if good then call('SET', KEYS[1], stamp .. mark) end
    end
  end
  if not good and type(old) == 'string' then call('SET', KEYS[1], old, 'KEEPTTL') end
end
if not good then return {'corrupt', KEYS[1]} end
count = token

local prefix = string.sub(KEYS[1], 1, -2)
local cancelled = mark ~= '' and call('EXISTS', prefix .. 'x:' .. id) == 1
if not cancelled and ARGV[4] + 0 < token and string.byte(ARGV[5]) ~= 98 then -- b has a block
  local modes = ARGV[6] and string.upper(modes) or modes
  local from, to = 2, #KEYS
-- include take.lua
  if taken then
    if ARGV[6] then call('SET', prefix .. 'm:' .. id, ARGV[6], 'PX', lease + GRACE) end
    return token
  end
end
local v = call('MGET', unpack(KEYS, 2))
local standing_as, wait, client, limit, refresh, life, claim, block =
  string.match(ARGV[5], '^([fbi])([wt]):(%x+):(%d+):(%d+):(%d+):(%d+):?(%d*)$')
block = tonumber(block) or 1
