-- Keeps requests alive: the slow way, behind renew_fast.lua, slots.lua and line.lua.
--
-- Each request as in protocol::Queue::renew, with two differences for the sake of those that share
-- the call: a key with a foreign value is a lost key, and a foreign token counter only keeps
-- waiters from being granted. Neither costs the other requests their leases.
if not bury() then return {'corrupt', corrupt} end

for _, x in ipairs(slow) do
  local id, lease = ARGV[x.a], tonumber(ARGV[x.a + 3])
  local owner, r = sub(id, 1, 32), sub(id, 33)
  local wants = wants_of(x.at, x.n, ARGV[x.a + 1])
  local rec = record(id)
  if rec then
    call('ZADD', E, text(now + rec.life), id)
    for _, w in ipairs(rec.wants) do
      local s = slot(w.name)
      s.need = math.max(s.need, now + rec.life)
    end
    if rec.meta then extend(P .. 'm:' .. id, math.ceil(rec.life / 1000) + GRACE) end
  end
  for _, w in ipairs(wants) do
    local s = slot(w.name)
    if not s.clean then dirty[#dirty + 1] = w.name end
  end
  promote()
  local n, tokens = held(owner, r, wants)
  rec = record(id)
  if n == #wants then
    local meta
    for _, w in ipairs(wants) do meta = lengthen(slot(w.name), owner, r, now + lease * 1000) end
    if meta then extend(P .. 'm:' .. id, lease + GRACE) end
    out[x.index] = ARGV[x.a + 4] == '1' and {'held', runs(tokens), reserved[id] or 1} or 1
  elseif n == 0 and rec then
    local _, ask = standing(rec)
    out[x.index] = {'queued', ask}
  else
    give_up(owner, r, wants)
    promote()
    out[x.index] = 0
  end
end
return save(out)
