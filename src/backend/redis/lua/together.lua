-- Releases and acquires of many requests, each of them the way that is taken when nobody is in the
-- way.
--
-- KEYS: 1 token counter, 2.. the heads of all requests, one after another, in the order of the
--       wants; releases come first
-- ARGV: 1 number of releases, 2 number of their heads, then for each release: owner and request,
--       modes, number of keys; for each acquire: owner and request, modes, number of keys, floor
--       (0 = none), lease in ms
-- Returns: for each: 1 released | the token of a grant | 0 nothing was done: ask again alone
--
-- Who needs a slow way, a look for tombstones, or to be told of an error, has to ask alone; so has
-- everybody when memory is full, because acquires are refused then.
local call = redis.call
local releases, heads = ARGV[1] + 0, ARGV[2] + 0
local v = call('MGET', unpack(KEYS, 1, heads + 1))
local out, gone = {}, {}
local from, a = 2, 3
for n = 1, releases do
  local id, modes = ARGV[a], ARGV[a + 1]
  local to = from + ARGV[a + 2] - 1
-- include mine.lua
  if mine then
    for i = from, to do gone[#gone + 1] = KEYS[i] end
  end
  out[n] = mine and 1 or 0
  from, a = to + 1, a + 3
end
if #gone > 0 then call('DEL', unpack(gone)) end
if a > #ARGV then return out end

local t = call('TIME')
local now = t[1] * 1000000 + t[2]
local last = math.min(now + 86400000000, 9007199254740991)
local before = v[1] or '0'
local good = #before < 17 and string.find(before, '^%d+$')
  and (v[1] or call('EXISTS', KEYS[1]) == 0)
local count = good and tonumber(before)
local token = good and math.max(now, count + 1)
local acquires = (#ARGV - a + 1) / 5
good = good and token + acquires <= last
-- The counter is written before any head: a token is never given out twice, whatever happens in
-- between. A number that nobody gets is harmless, but no floor may raise it: who has one that is
-- higher asks alone.
if good then call('SET', KEYS[1], string.format('%d', token + acquires - 1)) end
while a < #ARGV do
  local id, modes, lease = ARGV[a], ARGV[a + 1], ARGV[a + 4]
  local to = from + ARGV[a + 2] - 1
  local answer = 0
  if good and ARGV[a + 3] + 0 < token then
    local stamp = string.format('%d', token)
-- include take.lua
    if taken then
      answer, token = token, token + 1
    end
  end
  out[#out + 1] = answer
  from, a = to + 1, a + 5
end
return out
