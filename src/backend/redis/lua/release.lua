-- Gives up a grant: the slow way, behind release_fast.lua, slots.lua and line.lua.
--
-- A foreign value at one key does not keep the others held: they are freed, it is left as it is,
-- and the answer names it. So too when a waiter is next and the token counter is foreign: the
-- release has happened, as in protocol::Queue::release.
local owner, r = sub(ARGV[1], 1, 32), sub(ARGV[1], 33)
local wants = wants_of(1, #KEYS, modes)
for i, w in ipairs(wants) do load(w.name, v[i]) end
if not bury() then return {'corrupt', corrupt} end
local n = held(owner, r, wants)
give_up(owner, r, wants)
promote()
for _, w in ipairs(wants) do corrupt = corrupt or slot(w.name).bad end
if corrupt then return save({'corrupt', corrupt}) end
return save(n == #wants and 1 or 0)
