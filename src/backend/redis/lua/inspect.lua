-- Shows who holds a key and who waits for it. Writes nothing.
--
-- KEYS: 1 head, 2 line, 3 shared holders, 4 their deadlines, 5 records of waiters, 6 their ends
-- ARGV: none
-- Returns: now in µs, holders, waiters; or corrupt, Redis key.
--       holder: owner and request, mode, token, deadline, place, metadata
--       waiter: owner and request, mode, since, deadline, metadata
--
-- Metadata is false where there is none. Holders of several owners come in no order: place, then
-- token, tells it.
local call, try = redis.call, redis.pcall
local sub, match = string.sub, string.match
local t = call('TIME')
local now = t[1] * 1000000 + t[2]
local P = match(KEYS[1], '^palisade:{%d+}:')
local holders, waiters = {}, {}

local function metadata(id, present)
  local text = present and try('GET', P .. 'm:' .. id)
  return type(text) == 'string' and text
end

local function add(owner, token, m, r, deadline, place)
  if deadline <= now then return end
  local id = owner .. r
  local meta = metadata(id, m == string.upper(m))
  holders[#holders + 1] =
    {id, string.lower(m), token, string.format('%.0f', deadline), place, meta}
end

local function each(rest, f)
  local seen, i = 0, 0
  for m, r, n in string.gmatch(rest, ';([xsXS])(%x+):(%d+)') do
    if #r ~= 16 then return false end
    i = i + 1
    f(m, r, n, i)
    seen = seen + #n + 19
  end
  return seen == #rest
end

local function packed(v)
  local m, id, token = match(v, '^%-([xsXS])(%x+):(%d+)$')
  if m then
    local left = call('PTTL', KEYS[1])
    add(sub(id, 1, 32), token, m, sub(id, 33), now + left * 1000, '0')
    return #id == 48 and left >= 0
  end
  local owner, of, rest = match(v, '^=(%x+):(%d+)(;.+)$')
  return v == '=' or owner and #owner == 32 and each(rest, function(mode, r, n, i)
    add(owner, of, mode, r, tonumber(n), tostring(i))
  end)
end

local function many()
  local all, ends = try('HGETALL', KEYS[3]), try('ZRANGE', KEYS[4], 0, -1, 'WITHSCORES')
  if all.err or ends.err then return false end
  local deadline = {}
  for i = 1, #ends, 2 do deadline[ends[i]] = tonumber(ends[i + 1]) end
  for i = 1, #all, 2 do
    local owner = all[i]
    local token, rest = match(all[i + 1], '^(%d+)(;.+)$')
    if not token or not each(rest, function(m, r, n)
      add(owner, token, m, r, deadline[owner .. r] or 0, n)
    end) then return false end
  end
  return true
end

local head = try('GET', KEYS[1])
local ours = not head
if head == '#' then ours = many() elseif type(head) == 'string' then ours = packed(head) end
if not ours then return {'corrupt', KEYS[1]} end
local line = try('ZRANGE', KEYS[2], 0, -1)
if line.err then return {'corrupt', KEYS[2]} end
for _, w in ipairs(line) do
  local id = sub(w, 2)
  local v, ends = try('HGET', KEYS[5], id), try('ZSCORE', KEYS[6], id)
  v = type(v) == 'string' and v or ''
  local since, meta = match(v, '^%d+:(%d+):%d+:%d+:%d+:%x+:%d+:([01]):')
  if since and type(ends) == 'string' and tonumber(ends) > now then
    local deadline = string.format('%.0f', tonumber(ends))
    waiters[#waiters + 1] = {id, sub(w, 1, 1), since, deadline, metadata(id, meta == '1')}
  end
end
return {string.format('%.0f', now), holders, waiters}
