-- What the writing scripts share, second half: who waits, who is next, and saving.
--
-- KEYS, ARGV: those of the script that it is part of; only wants_of looks at them
-- Returns: nothing; it defines what the script's own part uses. Stands behind slots.lua

-- The record of a request that waits, or nil. Names are separated by NUL, which no key contains.
local function record(id)
  local v = call('HGET', W, id)
  if not v then return nil end
  local ticket, since, refresh, life, claim, client, floor, meta, block, modes, names =
    match(v, '^(%d+):(%d+):(%d+):(%d+):(%d+):(%x+):(%d+):([01]):(%d+):([xs]+):(.+)$')
  if not ticket then return nil end
  local wants = {}
  for name in gmatch(names, '[^%z]+') do
    local i = #wants + 1
    wants[i] = {name = name, m = #modes == 1 and modes or sub(modes, i, i)}
  end
  return {
    id = id, owner = sub(id, 1, 32), r = sub(id, 33), ticket = tonumber(ticket),
    refresh = tonumber(refresh), life = tonumber(life), claim = tonumber(claim), client = client,
    floor = tonumber(floor), meta = meta == '1', block = tonumber(block), wants = wants,
  }
end

-- Takes a waiter out of every line.
local function leave(rec)
  call('HDEL', W, rec.id)
  call('ZREM', E, rec.id)
  for _, w in ipairs(rec.wants) do
    local s = slot(w.name)
    if not s.bad then
      s.line = s.line - call('ZREM', s.q, w.m .. rec.id)
      s.changed = s.changed or not s.many
    end
  end
end

-- Ends a waiter: its place becomes free.
local function drop(rec)
  leave(rec)
  for _, w in ipairs(rec.wants) do weaken(slot(w.name)) end
  if rec.meta then call('DEL', P .. 'm:' .. rec.id) end
end

-- Removes the waiters of the partition that stopped refreshing, so that those in the lines live.
-- False when the partition's own keys are foreign.
local function bury()
  local ended = try('ZRANGEBYSCORE', E, '-inf', text(now), 'LIMIT', 0, 1000)
  if ended.err then corrupt = E end
  if type(try('HLEN', W)) ~= 'number' then corrupt = W end
  if corrupt then return false end
  for _, id in ipairs(ended) do
    local rec = record(id)
    if rec then drop(rec) else call('ZREM', E, id) end
  end
  return true
end

-- Collects the waiters at a key that the key itself would let in. Nobody behind the first that
-- wants to be alone can be: it is in the way of all who came later, in line or as a holder. (Of all
-- but its own owner: but an owner has one waiting request, and its clients see to that.)
local function front(s, found)
  local from, size = 0, 1
  while from < s.line do
    for _, member in ipairs(call('ZRANGE', s.q, from, from + size - 1)) do
      local m, id = sub(member, 1, 1), sub(member, 2)
      local open = not taken(s, sub(id, 1, 32), m)
      if open then
        local rec = record(id)
        local ticket = rec and rec.ticket or 0
        found[#found + 1] = {ticket = ticket, id = id, rec = rec, s = s, member = member}
      end
      if m == 'x' and (open or call('HEXISTS', W, id) == 1) then return end
    end
    from, size = from + size, size * 8
  end
end

-- How many tokens those who were let in by this call have.
local reserved = {}

-- Grants one waiter if nothing is in its way on any of its keys.
local function let_in(c)
  local rec = c.rec
  if not rec then -- its record was deleted by somebody else
    c.s.line = c.s.line - call('ZREM', c.s.q, c.member)
    c.s.changed = c.s.changed or not c.s.many
    return weaken(c.s)
  end
  for _, w in ipairs(rec.wants) do
    local s = slot(w.name)
    if upgrades(s, rec.owner, w.m) or taken(s, rec.owner, w.m)
        or earlier(s, rec.owner, w.m, w.m .. rec.id) then return end
  end
  local token = next_token(rec.floor)
  if not token then return end
  leave(rec)
  local tokens, block =
    hold(rec.owner, rec.r, rec.wants, now + rec.claim, token, rec.meta, rec.block)
  reserved[rec.id] = block
  -- A push is a hint; a user who may not publish must not stop the script half-way.
  try('PUBLISH', 'palisade:c:' .. rec.client, rec.id .. ' ' .. runs(tokens) .. ' ' .. block)
end

-- Grants every waiter that the changes at the dirty keys let through, in the order of arrival.
-- A grant lets nobody else through, so one pass is enough for what is known; a lapse that is found
-- on the way makes another pass.
local function promote()
  while #dirty > 0 do
    local found, seen = {}, {}
    local names = dirty
    dirty = {}
    for _, name in ipairs(names) do
      local s = slot(name)
      if not (s.bad or s.clean) then
        s.clean = true
        front(s, found)
      end
    end
    table.sort(found, function(a, b) return a.ticket < b.ticket end)
    for _, c in ipairs(found) do
      if not seen[c.id] then
        seen[c.id] = true
        let_in(c)
      end
    end
  end
end

-- Where a waiter stands, and when it should ask again: after one refresh interval, or, for the
-- first in a line, when the last lease in its way may have lapsed. Tells those directly before it,
-- once each, that they are followed; the client of a request is the end of its owner.
local function standing(rec)
  local position, ends, told = 0, 0, {}
  local function follow(m, id)
    if m ~= 'x' or told[id] or sub(id, 1, 32) == rec.owner then return end
    told[id] = true
    try('PUBLISH', 'palisade:c:' .. sub(id, 25, 32), id .. ' followed')
  end
  for _, w in ipairs(rec.wants) do
    local s = slot(w.name)
    local rank = not s.bad and call('ZRANK', s.q, w.m .. rec.id) or 0
    position = math.max(position, rank)
    if rank == 0 then
      for _, e in ipairs(s.list) do
        ends = math.max(ends, e.n)
        follow(lower(e.m), s.owner .. e.r)
      end
      if s.many then ends = math.max(ends, call('ZRANGE', s.d, -1, -1, 'WITHSCORES')[2] or 0) end
    else
      local ahead = call('ZRANGE', s.q, rank - 1, rank - 1)[1]
      follow(sub(ahead, 1, 1), sub(ahead, 2))
    end
  end
  if ends == 0 then return position, rec.refresh end
  return position, math.min(rec.refresh, math.max(0, ends - now) + 1000)
end

-- How many of the wants a request holds, and with which tokens.
local function held(owner, r, wants)
  local n, tokens = 0, {}
  for i, w in ipairs(wants) do
    local token, list = own(slot(w.name), owner)
    if find(list, r) then n, tokens[i] = n + 1, token end
  end
  return n, tokens
end

-- Gives up what is held of a request, and its place in line.
local function give_up(owner, r, wants)
  for _, w in ipairs(wants) do remove(slot(w.name), owner, r) end
  local rec = record(owner .. r)
  if rec then drop(rec) end
end

-- Writes back what changed; the records of waiters live as long as the longest line.
-- Returns `reply`.
local function save(reply)
  local longest = 0
  for _, s in ipairs(order) do
    if s.many and s.owners == 0 then narrow(s) end
    if not s.bad and (s.changed or s.need > 0) then longest = math.max(longest, write(s)) end
  end
  if longest > 0 then
    extend(W, longest)
    extend(E, longest)
  end
  return reply
end

-- The wants that begin at KEYS[first]; `modes` as in ARGV.
local function wants_of(first, n, modes)
  local wants = {}
  for i = 1, n do
    local m = #modes == 1 and modes or sub(modes, i, i)
    wants[i] = {name = sub(KEYS[first + i - 1], #P + 3), m = m}
  end
  return wants
end
