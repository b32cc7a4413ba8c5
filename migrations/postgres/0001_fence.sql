-- What palisade keeps in a PostgreSQL database (13 or newer). Times are microseconds.

-- Who this database is, under whatever name a program opens it.
CREATE TABLE palisade_store (
    id uuid NOT NULL
);
INSERT INTO palisade_store (id) VALUES (gen_random_uuid());

-- One row per key: the newest tokens seen, and who wrote last under the key. Keys sort byte by
-- byte, as everywhere in palisade, whatever the collation of the database. prior_tx is the write_tx
-- that the last writer found; it settles a commit whose reply was lost. Rows are changed all the
-- time and never indexed by anything that changes: leave room for HOT.
CREATE TABLE palisade_fence (
    resource text COLLATE "C" NOT NULL PRIMARY KEY,
    write_token bigint NOT NULL,
    write_owner uuid,
    write_tx uuid,
    prior_tx uuid,
    read_token bigint NOT NULL,
    touched bigint NOT NULL
) WITH (fillfactor = 70);

-- Tokens at or below the mark are refused, so rows that carry no higher one may go. advanced is a
-- time at which the mark was known to be committed; NULL while it is not.
CREATE TABLE palisade_watermark (
    mark bigint NOT NULL,
    advanced bigint
);
INSERT INTO palisade_watermark (mark, advanced) VALUES (0, 0);

-- What each session works on, committed before its branch begins, so that others can see it while
-- the branch is open. One row per session, not per branch: it is overwritten, never deleted on the
-- way out, and means nothing unless the session's application_name names the same attempt.
-- Unlogged: a crash ends every session anyway. resources holds the keys in hex, because the row is
-- written in one message with BEGIN, which takes no parameters.
CREATE UNLOGGED TABLE palisade_branch (
    pid integer NOT NULL PRIMARY KEY,
    backend_start timestamptz NOT NULL,
    attempt uuid NOT NULL,
    owner uuid NOT NULL,
    resources text[] NOT NULL,
    exclusive boolean[] NOT NULL,
    tokens bigint[] NOT NULL
) WITH (fillfactor = 70);
