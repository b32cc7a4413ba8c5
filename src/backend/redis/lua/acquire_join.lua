-- Asks for one key at which others wait: behind acquire_fast.lua.
--
-- ARGV[5]: f (fresh), b (fresh, with a block of tokens) or i (incremental), w (wait) or t (try),
--       then :client:limit, refresh, waiter and claim times in µs, and for b the block
--
-- Where one owner holds the key alone and a line stands behind it, whoever comes can only go to the
-- end of the line. This is most of what happens at a hot key; all the rest, a waiter that has died
-- anywhere in the partition included, is left to the slow way. Nothing is written before all of it
-- is seen to be ours, and then the Redis keys are there and have a TTL, which GT only lengthens.

-- Records a waiter. Its place is a number from the token counter: that grows, whatever the clock
-- does.
local function enrol(place, names)
  call('ZADD', prefix .. 'e', string.format('%d', now + life), id)
  call('HSET', prefix .. 'w', id, table.concat({
    place, string.format('%d', now), refresh, life, claim, client, ARGV[4],
    ARGV[6] and '1' or '0', block, modes, names,
  }, ':'))
end

local holder, entry, ends = string.match(v[1] or '', '^=(%x+):%d+;x(%x+):(%d+)$')
if holder and #holder == 32 and #entry == 16 and tonumber(ends) > now and #KEYS == 2
    and holder ~= string.sub(id, 1, 32) and standing_as ~= 'i' and wait == 'w'
    and mark == '' and not ARGV[6] and ARGV[4] + 0 < last then
  local try = redis.pcall
  local name = string.sub(KEYS[2], #prefix + 3)
  local q, w, e = prefix .. 'q:' .. name, prefix .. 'w', prefix .. 'e'
  local line = try('ZCARD', q)
  local dead = try('ZRANGEBYSCORE', e, '-inf', stamp, 'LIMIT', 0, 1)
  local known = try('HEXISTS', w, id)
  if type(line) == 'number' and line > 0 and not dead.err and #dead == 0 and known == 0 then
    local ahead = call('ZRANGE', q, -1, -1)[1]
    call('ZADD', q, stamp, modes .. id)
    enrol(stamp, name)
    local ttl = string.format('%d', math.ceil(life / 1000) + GRACE)
    for _, key in ipairs({KEYS[2], q, w, e}) do call('PEXPIRE', key, ttl, 'GT') end
    local before = string.sub(ahead, 2)
    if string.sub(ahead, 1, 1) == 'x' and string.sub(before, 1, 32) ~= string.sub(id, 1, 32) then
      try('PUBLISH', 'palisade:c:' .. string.sub(before, 25, 32), before .. ' followed')
    end
    return {'queued', line, tonumber(refresh)}
  end
end
