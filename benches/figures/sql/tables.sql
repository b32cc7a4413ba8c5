-- The bank, and a fence as it would be written by hand. Rows are changed all the time: the room
-- that is left lets a change stay on its page, as in palisade's own tables.
CREATE TABLE IF NOT EXISTS account (
    id text COLLATE "C" NOT NULL PRIMARY KEY,
    balance bigint NOT NULL
) WITH (fillfactor = 70);

CREATE TABLE IF NOT EXISTS hand_fence (
    resource text COLLATE "C" NOT NULL PRIMARY KEY,
    token bigint NOT NULL
) WITH (fillfactor = 70);
