-- What palisade keeps in a SQLite database. Ids are UUIDs as 16 bytes, times are microseconds.

-- Who this database is, under whatever name a program opens it.
CREATE TABLE palisade_store (
    id BLOB NOT NULL
);
INSERT INTO palisade_store (id) VALUES (randomblob(16));

-- One row per key: the newest tokens seen, and who wrote last under the key.
-- prior_tx is the write_tx that the last writer found; it settles a commit whose reply was lost.
CREATE TABLE palisade_fence (
    resource TEXT NOT NULL PRIMARY KEY,
    write_token INTEGER NOT NULL,
    write_owner BLOB,
    write_tx BLOB,
    prior_tx BLOB,
    read_token INTEGER NOT NULL,
    touched INTEGER NOT NULL
) WITHOUT ROWID;

-- Tokens at or below the mark are refused, so rows that carry no higher one may go. advanced is the
-- time at which the mark was last moved.
CREATE TABLE palisade_watermark (
    mark INTEGER NOT NULL,
    advanced INTEGER NOT NULL
);
INSERT INTO palisade_watermark (mark, advanced) VALUES (0, 0);
