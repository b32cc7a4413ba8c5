-- Asks for all keys of a set: the way that is taken when nobody is in the way.
--
-- KEYS: 1 token counter, 2 tombstone of the request, 3.. heads, in the order of the wants
-- ARGV: 1 owner and request, 2 lease in ms, 3 modes: x or s, one for all keys or one each,
--       4 floor (0 = none), 5 what only the slow way needs, 6 metadata (missing = none)
-- Returns: a token, which all keys got, or an array:
--       granted, tokens as number*times,... | queued, position, ask again in µs |
--       busy, index of the want, 1 if somebody waits, owners... | upgrade, index | limit, index |
--       cancelled | corrupt, Redis key
--
-- One MGET reads everything that could be in the way, the tombstone included, so that a late copy
-- of a cancelled request costs no call of its own. MGET shows a value of a foreign type as missing:
-- EXISTS and NX keep it from being overwritten. The counter is checked before the first write.
-- Refused by Redis as a whole when memory is full: the script has no allow-oom flag.
local call = redis.call
local v = call('MGET', unpack(KEYS))
local t = call('TIME')
local now = t[1] * 1000000 + t[2]
local count = 0
if v[1] then
  if #v[1] > 16 or not string.find(v[1], '^%d+$') then return {'corrupt', KEYS[1]} end
  count = tonumber(v[1])
elseif call('EXISTS', KEYS[1]) == 1 then
  return {'corrupt', KEYS[1]}
end
local token = math.max(count + 1, ARGV[4] + 1, now)
if token > now + 86400000000 or token >= 9007199254740992 then return {'corrupt', KEYS[1]} end
local free = not v[2]
local last = #KEYS
for i = 3, last do
  if v[i] then
    free = false
    break
  end
end
if free then
  local modes = ARGV[6] and string.upper(ARGV[3]) or ARGV[3]
  local tail = ARGV[1] .. ':' .. string.format('%.0f', token)
  local value = #modes == 1 and '-' .. modes .. tail
  for i = 3, last do
    local head = value or '-' .. string.sub(modes, i - 2, i - 2) .. tail
    if not call('SET', KEYS[i], head, 'NX', 'PX', ARGV[2]) then
      if i > 3 then call('DEL', unpack(KEYS, 3, i - 1)) end
      return {'corrupt', KEYS[i]}
    end
  end
  call('SET', KEYS[1], string.format('%.0f', token))
  if ARGV[6] then
    local key = string.match(KEYS[1], '^palisade:{%d+}:') .. 'm:' .. ARGV[1]
    call('SET', key, ARGV[6], 'PX', ARGV[2] + 30000)
  end
  return token
end
