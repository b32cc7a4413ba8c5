-- Keeps requests alive, held or queued: the way for leases that nobody else has touched.
--
-- KEYS: the heads of all requests, one request after another, in the order of their wants
-- ARGV: five for each request: owner and request, modes, number of keys, lease in ms, 1 if it waits
-- Returns: one answer for each: 1 held | 0 lost | held, tokens as number*times,..., how many were
--       reserved | queued, ask again in µs. Or only: corrupt, Redis key
--
-- A head that begins as the fast way of acquire wrote it has no explicit deadline: its TTL is the
-- lease. One with others in line behind a single holder has; nobody but that holder is looked at,
-- since while it is there nobody else can be let in. GT: a deadline never moves back. Who waits
-- must be told its tokens, the slow way.
local call = redis.call
-- include grace.lua
local v = call('MGET', unpack(KEYS))
local t = call('TIME')
local now = t[1] * 1000000 + t[2]
local out, slow = {}, {}
local from = 1
for a = 1, #ARGV, 5 do
  local id, modes, n = ARGV[a], ARGV[a + 1], tonumber(ARGV[a + 2])
  local to = from + n - 1
-- include mine.lua
  local index = (a + 4) / 5
  local holds = ARGV[a + 4] == '0'
  local single, ends
  if holds and not mine and n == 1 then
    single, ends = string.match(v[from] or '',
      '^(=' .. string.sub(id, 1, 32) .. ':%d+;x' .. string.sub(id, 33) .. ':)(%d+)$')
  end
  if holds and mine then
    for i = from, to do call('PEXPIRE', KEYS[i], ARGV[a + 3], 'GT') end
    out[index] = 1
  elseif single and tonumber(ends) > now then
    local deadline = string.format('%d', math.max(ends + 0, now + ARGV[a + 3] * 1000))
    call('SET', KEYS[from], single .. deadline, 'KEEPTTL')
    call('PEXPIRE', KEYS[from], string.format('%d', ARGV[a + 3] + GRACE), 'GT')
    out[index] = 1
  else
    slow[#slow + 1] = {index = index, a = a, at = from, n = n}
  end
  from = to + 1
end
if #slow == 0 then return out end
local count, mark
