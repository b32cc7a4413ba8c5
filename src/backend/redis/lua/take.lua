-- Part of a script: takes heads for one request, if all of them are free.
--
-- KEYS, ARGV: those of the script around it. Expects from, to, the heads; id, modes, lease, as in
--       ARGV; stamp, the token as text
-- Returns: nothing; it defines taken
--
-- NX keeps whatever stands there, a foreign type included; what was set before it is undone.
local taken = true
local head = '-' .. modes .. id .. ':' .. stamp
for i = from, to do
  if #modes > 1 then
    head = '-' .. string.sub(modes, i - from + 1, i - from + 1) .. id .. ':' .. stamp
  end
  if not call('SET', KEYS[i], head, 'NX', 'PX', lease) then
    if i > from then call('DEL', unpack(KEYS, from, i - 1)) end
    taken = false
    break
  end
end
