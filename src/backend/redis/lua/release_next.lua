-- Gives up the only grant at a key, and hands it to the first in line: behind release_fast.lua.
--
-- Only where that is all there is to do: the first wants to be alone, waits for this key only, and
-- asked for no more than a grant; and no waiter has died anywhere in the partition. All the rest is
-- left to the slow way. Nothing is written before all of it is seen to be ours.
local owner, r = string.sub(id, 1, 32), string.sub(id, 33)
local ends = string.match(v[1] or '', '^=' .. owner .. ':%d+;x' .. r .. ':(%d+)$')
if ends and to == 1 and tonumber(ends) > now then
  local try, match = redis.pcall, string.match
  local prefix, name = match(KEYS[1], '^(palisade:{%d+}:)k:(.+)$')
  local q, w, e, t = prefix .. 'q:' .. name, prefix .. 'w', prefix .. 'e', prefix .. 't'
  local dead = try('ZRANGEBYSCORE', e, '-inf', string.format('%d', now), 'LIMIT', 0, 1)
  local first = try('ZRANGE', q, 0, 0)[1]
  local next = not dead.err and #dead == 0 and first and match(first, '^x(%x+)$')
  local rec = next and try('HGET', w, next)
  local claim, client, floor, names = match(type(rec) == 'string' and rec or '',
    '^%d+:%d+:%d+:%d+:(%d+):(%x+):(%d+):0:1:x:(.+)$')
  local counter = names == name and try('GET', t)
  local n, mark = match(type(counter) == 'string' and counter or '', '^(%d+)(!?%d*)$')
  local token = n and #n < 17 and math.max(now, n + 1)
  if token and token > floor + 0 and token <= now + 86400000000 and token < 9007199254740992 then
    local stamp = string.format('%d', token)
    call('SET', t, stamp .. mark) -- before what it was read for
    call('ZREM', q, first)
    call('ZREM', e, next)
    call('HDEL', w, next)
    owner, r = string.sub(next, 1, 32), string.sub(next, 33)
    if call('EXISTS', q) == 1 then
      -- The head lives for GRACE longer than whoever waits here, and no claim is as long.
      local deadline = string.format('%d', now + claim)
      call('SET', KEYS[1], '=' .. owner .. ':' .. stamp .. ';x' .. r .. ':' .. deadline, 'KEEPTTL')
    else
      local ms = string.format('%d', math.ceil(claim / 1000))
      call('SET', KEYS[1], '-x' .. next .. ':' .. stamp, 'PX', ms)
    end
    try('PUBLISH', 'palisade:c:' .. client, next .. ' ' .. stamp .. '*1 1')
    return 1
  end
end
