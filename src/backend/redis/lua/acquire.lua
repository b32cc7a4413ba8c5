-- Asks for all keys of a set: the slow way, behind acquire_fast.lua, acquire_join.lua, slots.lua
-- and line.lua. The order of the checks is that of protocol::Queue::acquire.
local owner, r = sub(ARGV[1], 1, 32), sub(ARGV[1], 33)
local fresh = standing_as ~= 'i'
local floor = tonumber(ARGV[4])
local meta = ARGV[6]
local wants = wants_of(2, #KEYS - 1, modes)
-- Whoever joined the line with a floor that no token can exceed would stop it when its turn came.
if not next_token(floor) then return {'corrupt', corrupt} end

local function foreign()
  for _, w in ipairs(wants) do
    local s = load(w.name)
    if s.bad or s.stuck then return {'corrupt', s.bad or s.stuck} end
  end
end

-- Nothing is written before all of this is seen to be ours.
for i, w in ipairs(wants) do own(load(w.name, v[i]), owner) end
local refused = foreign()
if refused then return refused end
if not bury() then return {'corrupt', corrupt} end

for _, w in ipairs(wants) do slot(w.name) end
promote()
if cancelled then return save({'cancelled'}) end
local n, tokens = held(owner, r, wants)
if n == #wants then
  -- Whoever asks again counts a whole lease from its first asking. If the first copy was queued and
  -- then handed over, there is only a claim.
  for _, w in ipairs(wants) do lengthen(slot(w.name), owner, r, now + ARGV[2] * 1000) end
  if meta then extend(P .. 'm:' .. ARGV[1], ARGV[2] + GRACE) end
  return save({'granted', runs(tokens)})
end
if n > 0 then -- sent twice, and a part of it was deleted by somebody else meanwhile
  give_up(owner, r, wants)
  promote()
end
local rec = record(ARGV[1])
if rec then
  local position, ask = standing(rec)
  return save({'queued', position, ask})
end

local blocked
for i, w in ipairs(wants) do
  local s = slot(w.name)
  local token, list = own(s, owner)
  if upgrades(s, owner, w.m) then return save({'upgrade', i}) end
  if token and #list >= tonumber(limit) then return save({'limit', i}) end
  if not blocked and (taken(s, owner, w.m)
      or (not token and fresh and earlier(s, owner, w.m))) then blocked = i end
end
refused = foreign()
if refused then return save(refused) end
local number = next_token(blocked and 0 or floor)
if not number then return save({'corrupt', corrupt}) end

if blocked and not (fresh and wait == 'w') then
  local s = slot(wants[blocked].name)
  local reply = {'busy', blocked, s.line > 0 and 1 or 0}
  local owners = s.many and call('HKEYS', s.h) or (#s.list > 0 and {s.owner}) or {}
  for _, other in ipairs(owners) do
    if other ~= owner then reply[#reply + 1] = other end
  end
  return save(reply)
end

if meta then call('SET', P .. 'm:' .. ARGV[1], meta, 'PX', ARGV[2] + GRACE) end
if not blocked then
  tokens, block = hold(owner, r, wants, now + ARGV[2] * 1000, number, meta, block)
  return save({'granted', runs(tokens), block})
end
local ends = now + life
local names = {}
take(number)
for i, w in ipairs(wants) do
  local s = slot(w.name)
  names[i] = w.name
  call('ZADD', s.q, text(number), w.m .. ARGV[1])
  s.changed = s.changed or s.line == 0 and not s.many
  s.line = s.line + 1
  s.need = math.max(s.need, ends)
end
enrol(text(number), table.concat(names, '\0'))
local position, ask = standing(record(ARGV[1]))
return save({'queued', position, ask})
