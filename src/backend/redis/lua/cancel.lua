-- Ends a request whatever became of it: not arrived yet, queued, granted, released.
-- Behind cancel_start.lua, slots.lua and line.lua.
--
-- KEYS: 1 tombstone of the request, 2.. heads, in the order of the wants
-- ARGV: 1 owner and request, 2 ms that the tombstone lives
-- Returns: 1 | corrupt, Redis key
--
-- The tombstone comes first: whatever else is wrong, a late copy of the request is not granted. The
-- counter is marked until it has gone, so that acquires look for tombstones only while there are
-- some.
local owner, r = sub(ARGV[1], 1, 32), sub(ARGV[1], 33)
call('SET', KEYS[1], '1', 'PX', ARGV[2])
if next_token(0) then
  mark = '!' .. text(now + ARGV[2] * 1000 + 1000)
  call('SET', P .. 't', text(count) .. mark)
end
corrupt = nil
if not bury() then return {'corrupt', corrupt} end
local wants = wants_of(2, #KEYS - 1, 'x')
give_up(owner, r, wants)
promote()
for _, w in ipairs(wants) do corrupt = corrupt or slot(w.name).bad end
if corrupt then return save({'corrupt', corrupt}) end
return save(1)
