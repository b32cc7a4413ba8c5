-- What the writing scripts share, first half: what stands at a key, and who holds it.
--
-- KEYS, ARGV: those of the script that it is part of; from KEYS[1] the prefix of the partition
-- Returns: nothing; it defines what line.lua and the script's own part use
--
-- Stands between the fast way of a script and its slow way, so that a call that meets nobody never
-- pays for it. Expects: call = redis.call; GRACE; now = the clock in µs, read once; count, mark =
-- the number in the token counter and what follows it, where it was read already, else nil. The
-- layout, and why: docs of redis/mod.rs.
--
-- Every script loads and checks, decides, writes, and saves last. Reads of what could be foreign go
-- through pcall; after a slot is loaded, no later call on its keys can fail.
local try = redis.pcall
local sub, match, gmatch = string.sub, string.match, string.gmatch
local upper, lower = string.upper, string.lower
local P = match(KEYS[1], '^palisade:{%d+}:')
local W, E = P .. 'w', P .. 'e'
local slots, order = {}, {} -- by name, and in the order in which they were loaded
local dirty = {} -- names of keys at which something got weaker
local corrupt -- the Redis key that holds something foreign

local function text(number) return string.format('%d', number) end

-- A TTL is only ever made longer, also that of a key which has none.
local function extend(key, ms)
  if call('PTTL', key) < ms then call('PEXPIRE', key, text(ms)) end
end

-- The token that a grant would get, or nil when the counter or the floor is not to be believed.
local function next_token(floor)
  if not count then
    local v = try('GET', P .. 't') or '0'
    local n, m = match(type(v) == 'string' and v or '', '^(%d+)(!?%d*)$')
    if not n or #n > 16 then
      corrupt = P .. 't'
      return nil
    end
    count, mark = tonumber(n), m
  end
  local token = math.max(count + 1, floor + 1, now)
  if token > now + 86400000000 or token >= 9007199254740992 then
    corrupt = P .. 't'
    return nil
  end
  return token
end

-- The counter is written before what it was read for: a token is never given out twice.
local function take(token)
  count = token
  call('SET', P .. 't', text(token) .. mark)
end

-- Reads `;` mode request `:` number, repeated. Nil when there is anything else.
local function entries(rest)
  local list, seen = {}, 0
  for m, r, n in gmatch(rest, ';([xsXS])(%x+):(%d+)') do
    if #r ~= 16 then return nil end
    list[#list + 1] = {m = m, r = r, n = tonumber(n)}
    seen = seen + #n + 19
  end
  return seen == #rest and list or nil
end

-- Fills a slot from the value of its head; false when that is not ours.
local function read(s, v)
  if type(v) ~= 'string' then return false end
  if v == '=' then return true end
  if v == '#' then
    s.many, s.cache = true, {}
    s.owners = try('HLEN', s.h)
    return type(s.owners) == 'number' and type(try('ZCARD', s.d)) == 'number'
  end
  local m, id, token = match(v, '^%-([xsXS])(%x+):(%d+)$')
  if m then
    local left = call('PTTL', s.head)
    s.owner, s.token = sub(id, 1, 32), tonumber(token)
    s.list = {{m = m, r = sub(id, 33), n = now + left * 1000}}
    return #id == 48 and left >= 0
  end
  local owner, of, rest = match(v, '^=(%x+):(%d+)(;.+)$')
  s.owner, s.token = owner, tonumber(of)
  s.list = rest and entries(rest)
  return s.list and #owner == 32
end

-- What stands at a key. `v` is the head's value where it was read already.
--   head, q, h, d        names of its Redis keys
--   had                  whether the head exists
--   owner, token, list   the holder: n of an entry is its deadline, in µs
--   many                 holders of several owners, all shared: h is owner -> entries, n of an
--                        entry is its place among them; d is entry -> deadline
--   line                 how many wait
--   need                 until when the slot must live, in µs, beside the deadlines in list
--   bad                  the Redis key in which something foreign stands; the slot is not touched
local function load(name, v)
  local s = slots[name]
  if s then return s end
  s = {name = name, head = P .. 'k:' .. name, q = P .. 'q:' .. name, list = {}, need = 0}
  s.h, s.d = P .. 'h:' .. name, P .. 'd:' .. name
  slots[name] = s
  order[#order + 1] = s
  v = v or try('GET', s.head)
  s.line = try('ZCARD', s.q)
  if type(s.line) == 'table' then
    s.bad = s.q
  elseif v then
    s.had = true
    if not read(s, v) then s.bad = s.many and s.h or s.head end
  end
  if s.bad then s.list, s.line, s.many = {}, 0, nil end
  return s
end

-- Something at this key got weaker.
local function weaken(s)
  s.clean = false
  dirty[#dirty + 1] = s.name
end

-- The token and the entries of an owner at a key, or nil.
local function own(s, owner)
  if s.bad then return nil end
  if not s.many then
    if s.owner == owner and #s.list > 0 then return s.token, s.list end
    return nil
  end
  local mine = s.cache[owner]
  if mine == nil then
    local v = call('HGET', s.h, owner)
    mine = false
    if v then
      local token, rest = match(v, '^(%d+)(;.+)$')
      local list = rest and entries(rest)
      if not list then
        s.bad = s.h
        return nil
      end
      mine = {token = tonumber(token), list = list}
    end
    s.cache[owner] = mine
  end
  if mine then return mine.token, mine.list end
  return nil
end

local function find(list, r)
  for i, e in ipairs(list or {}) do
    if e.r == r then return i end
  end
end

-- Whether the owner holds the key in a weaker mode: then a grant would be an upgrade, with a token
-- that other readers may have passed.
local function upgrades(s, owner, m)
  local _, list = own(s, owner)
  if not list or m == 's' then return false end
  for _, e in ipairs(list) do
    if lower(e.m) == 'x' then return false end
  end
  return true
end

-- Moves the deadline of an entry that is there, never back. Returns whether it has metadata.
local function lengthen(s, owner, r, deadline)
  local _, list = own(s, owner)
  local e = list[find(list, r)]
  if s.many then
    call('ZADD', s.d, 'XX', 'GT', text(deadline), owner .. r)
  else
    e.n = math.max(e.n, deadline)
    s.changed = true
  end
  s.need = math.max(s.need, deadline)
  return e.m == upper(e.m)
end

local function joined(list)
  local parts = {}
  for i, e in ipairs(list) do parts[i] = ';' .. e.m .. e.r .. ':' .. text(e.n) end
  return table.concat(parts)
end

-- Writes an owner's entries at a key of many owners.
local function store(s, owner, token, list)
  if #list == 0 then
    s.cache[owner] = false
    s.owners = s.owners - call('HDEL', s.h, owner)
  else
    s.cache[owner] = {token = token, list = list}
    s.owners = s.owners + call('HSET', s.h, owner, text(token) .. joined(list))
  end
end

-- Takes one entry away. Returns whether it was there.
local function remove(s, owner, r)
  local token, list = own(s, owner)
  local i = find(list, r)
  if not i then return false end
  local gone = table.remove(list, i)
  if s.many then
    call('ZREM', s.d, owner .. r)
    store(s, owner, token, list)
  end
  if gone.m == upper(gone.m) then call('DEL', P .. 'm:' .. owner .. r) end
  s.changed = s.changed or not s.many
  weaken(s)
  return true
end

-- A loaded slot without what has lapsed.
local function slot(name)
  local s = load(name)
  if s.pruned or s.bad then return s end
  s.pruned = true
  if s.many then
    for _, id in ipairs(call('ZRANGEBYSCORE', s.d, '-inf', text(now))) do
      if not remove(s, sub(id, 1, 32), sub(id, 33)) then call('ZREM', s.d, id) end
    end
  else
    for i = #s.list, 1, -1 do
      if s.list[i].n <= now then remove(s, s.owner, s.list[i].r) end
    end
  end
  return s
end

-- Whether a second owner could share the key: it takes h and d, which must not be foreign. If they
-- are, `stuck` names the one; those who hold the key alone do not need them.
local function widens(s)
  if s.wide == nil then
    local h, d = call('TYPE', s.h).ok, call('TYPE', s.d).ok
    s.wide = (h == 'none' or h == 'hash') and (d == 'none' or d == 'zset')
    if not s.wide then s.stuck = (h == 'none' or h == 'hash') and s.d or s.h end
  end
  return s.wide
end

-- Whether another owner holds the key in a mode that conflicts with `m`.
local function taken(s, owner, m)
  if s.bad then return true end
  if s.many then return m == 'x' and s.owners > (own(s, owner) and 1 or 0) end
  if #s.list == 0 or s.owner == owner then return false end
  if m == 'x' then return true end
  for _, e in ipairs(s.list) do
    if lower(e.m) == 'x' then return true end
  end
  return not widens(s)
end

-- Whether a conflicting waiter of another owner stands in line before `me`, or at all.
local function earlier(s, owner, m, me)
  local from, size = 0, 1
  while from < s.line do
    for _, w in ipairs(call('ZRANGE', s.q, from, from + size - 1)) do
      if w == me then return false end
      if (m == 'x' or sub(w, 1, 1) == 'x') and sub(w, 2, 33) ~= owner
          and call('HEXISTS', W, sub(w, 2)) == 1 then return true end
    end
    from, size = from + size, size * 8
  end
  return false
end

-- A second owner comes to share the key.
local function widen(s)
  call('DEL', s.h, s.d)
  s.many, s.owners, s.cache, s.changed = true, 0, {}, true
  for _, e in ipairs(s.list) do
    call('ZADD', s.d, text(e.n), s.owner .. e.r)
    s.need = math.max(s.need, e.n)
    e.n = s.token
  end
  store(s, s.owner, s.token, s.list)
  s.list = {}
end

-- Of several owners, none is left.
local function narrow(s)
  call('DEL', s.h, s.d)
  s.many, s.list, s.changed = nil, {}, true
end

-- Makes an owner a holder in one more way. The caller has seen that the key is not taken, so an
-- exclusive entry has no other owner beside it, and a key of several owners has shared entries
-- only.
local function add(s, owner, r, m, deadline, token)
  if s.many then
    if s.owners == 0 then narrow(s) end
  elseif #s.list > 0 and s.owner ~= owner then
    widen(s)
  end
  s.need = math.max(s.need, deadline)
  if s.many then
    local had, list = own(s, owner)
    list = list or {}
    -- Its place among the entries: after all tokens that were given out before.
    list[#list + 1] = {m = m, r = r, n = had and math.max(now, (count or 0) + 1) or token}
    store(s, owner, token, list)
    call('ZADD', s.d, text(deadline), owner .. r)
  else
    s.owner, s.token, s.changed = owner, token, true
    s.list[#s.list + 1] = {m = m, r = r, n = deadline}
  end
end

-- Grants a request on all of its keys; a key that its owner holds keeps its token. Reserves `block`
-- tokens if all keys are new, and one where the block would end more than a millisecond ahead of
-- the clock (protocol::last_of_block). Returns the tokens, and how many were reserved.
local function hold(owner, r, wants, deadline, fresh, meta, block)
  local tokens, took = {}, false
  if block > 1 then
    local last = fresh + block - 1
    local far = last > now + 1000 or last >= 9007199254740992
    for _, w in ipairs(wants) do
      if far or own(slot(w.name), owner) then block = 1 end
    end
  end
  for i, w in ipairs(wants) do
    local s = slot(w.name)
    local token = own(s, owner)
    if not token then
      if not took then take(fresh + block - 1) end
      token, took = fresh, true
    end
    tokens[i] = token
    add(s, owner, r, meta and upper(w.m) or w.m, deadline, token)
  end
  if meta then extend(P .. 'm:' .. owner .. r, math.ceil((deadline - now) / 1000) + GRACE) end
  return tokens, block
end

-- Tokens as number*times,...: a set of new keys has one token.
local function runs(tokens)
  local parts, i = {}, 1
  while i <= #tokens do
    local j = i
    while tokens[j + 1] == tokens[i] do j = j + 1 end
    parts[#parts + 1] = text(tokens[i]) .. '*' .. (j - i + 1)
    i = j + 1
  end
  return table.concat(parts, ',')
end

-- Writes one slot back. Returns the ms that its line must live, 0 without one.
local function write(s)
  if not s.many and s.line == 0 and #s.list < 2 then
    local e = s.list[1]
    if e then
      local ms = math.max(1, math.ceil((e.n - now) / 1000))
      call('SET', s.head, '-' .. e.m .. s.owner .. e.r .. ':' .. text(s.token), 'PX', text(ms))
    elseif s.had then
      call('DEL', s.head)
    end
    return 0
  end
  local need = s.need
  for _, e in ipairs(s.list) do need = math.max(need, e.n) end
  local left = s.had and call('PTTL', s.head) or 0
  local ttl = math.max(left, math.ceil((need - now) / 1000) + GRACE, GRACE)
  if s.changed or not s.had then
    local value = '#'
    if not s.many then
      value = #s.list == 0 and '=' or '=' .. s.owner .. ':' .. text(s.token) .. joined(s.list)
    end
    call('SET', s.head, value, 'PX', text(ttl))
  elseif left < ttl then
    call('PEXPIRE', s.head, text(ttl))
  end
  if s.many then
    extend(s.h, ttl)
    extend(s.d, ttl)
  end
  if s.line == 0 then return 0 end
  extend(s.q, ttl)
  return ttl
end
