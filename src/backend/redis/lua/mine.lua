-- Part of a script: whether heads stand as the fast way of acquire wrote them for one request.
--
-- KEYS, ARGV: those of the script around it. Expects v, the values of KEYS; from, to, the heads;
--       id, modes, as in ARGV
-- Returns: nothing; it defines mine
--
-- A head that begins so belongs to this request alone and has neither waiters nor metadata,
-- whatever its token. No function: to call one costs as much as all that is done here.
local mine = true
local begins = '-' .. modes .. id .. ':'
for i = from, to do
  if #modes > 1 then
    begins = '-' .. string.sub(modes, i - from + 1, i - from + 1) .. id .. ':'
  end
  if not v[i] or string.sub(v[i], 1, 51) ~= begins then
    mine = false
    break
  end
end
