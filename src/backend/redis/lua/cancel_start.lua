-- What slots.lua and line.lua expect, for a script that has no fast way: cancel.lua.
local call = redis.call
-- include grace.lua
local t = call('TIME')
local now = t[1] * 1000000 + t[2]
local count, mark
