//! The bugs that are edits of a text. Where a text has changed so that a fragment is not in it
//! exactly once any more, planting fails: find the place where it can be broken the same way.

use palisade::testing::Edit;

pub mod redis {
    use super::Edit;

    /// Whatever stands at a key is taken for the caller's.
    const ANYONES: Edit =
        Edit { of: "release", fragment: " or string.sub(v[i], 1, 51) ~= begins", instead: "" };

    pub const RELEASE_WITHOUT_OWNER: [Edit; 2] = [ANYONES, Edit { of: "together", ..ANYONES }];

    pub const RENEW_WITHOUT_OWNER: [Edit; 1] = [Edit { of: "renew", ..ANYONES }];

    const SET: Edit = Edit {
        of: "acquire",
        fragment: "not call('SET', KEYS[i], head, 'NX', 'PX', lease)",
        instead: "call('SETNX', KEYS[i], head) == 0 or not call('PEXPIRE', KEYS[i], lease)",
    };

    pub const SET_THEN_PEXPIRE: [Edit; 2] = [SET, Edit { of: "together", ..SET }];

    /// Each copy of an acquire counts as one more, and a release gives up any entry of its owner: a
    /// plain count of holds. Only where calls go alone, as they do unless there is a crowd.
    pub const NO_REQUEST_ID: [Edit; 3] = [
        Edit {
            of: "acquire",
            fragment: "local id, lease, modes = ",
            instead: "ARGV[1] = string.sub(ARGV[1], 1, 32)
                .. string.format('%016d', call('INCR', 'copies'))
                local id, lease, modes = ",
        },
        Edit { instead: " or string.sub(v[i], 1, 34) ~= string.sub(begins, 1, 34)", ..ANYONES },
        Edit {
            of: "release",
            fragment: "for i, w in ipairs(wants) do load(w.name, v[i]) end\n",
            instead: "for i, w in ipairs(wants) do load(w.name, v[i]) end
                local _, mine = own(slots[wants[1].name], owner)
                if mine and mine[1] then r = mine[1].r end
                ",
        },
    ];
}

pub mod postgres {
    use super::{END_OF_COMMENT, Edit, fence};

    /// Every token passes, and nothing is left behind.
    pub const NO_FENCE: [Edit; 2] = [
        fence(
            "SELECT k.resource, NULL::uuid AS prior_tx
             FROM unnest($1::text[], $2::boolean[], $3::bigint[])
                 AS k (resource, exclusive, token) /*",
        ),
        REST,
    ];

    /// Tokens are compared with the newest of a committed branch.
    pub const SELECT: [Edit; 2] = [
        fence(
            "SELECT f.resource, f.prior_tx FROM palisade_fence AS f
             JOIN unnest($1::text[], $2::boolean[], $3::bigint[])
                 AS k (resource, exclusive, token) ON k.resource = f.resource
             WHERE k.token > greatest(f.write_token, f.read_token)
                 OR (k.token = f.write_token AND f.write_owner = $4::uuid) /*",
        ),
        REST,
    ];

    /// As [`SELECT`], with locks that many can have.
    pub const FOR_SHARE: [Edit; 3] = [
        SELECT[0],
        REST,
        Edit { of: "fence", fragment: "$4::uuid) /*", instead: "$4::uuid) FOR SHARE OF f /*" },
    ];

    pub const WITHOUT_OWNER: [Edit; 1] =
        [Edit { of: "fence", fragment: " AND f.write_owner = excluded.write_owner", instead: "" }];

    /// Without a lock service no row is taken, and nothing is left behind.
    pub const NO_STORE_FENCE: [Edit; 3] = [
        Edit {
            of: "store_fence",
            ..fence(
                "SELECT k.resource, NULL::uuid AS prior_tx
                 FROM unnest($1::text[]) AS k (resource) /*",
            )
        },
        Edit { of: "store_fence", ..REST },
        Edit { of: "store_fence", fragment: "FOR NO KEY UPDATE", instead: "" },
    ];

    const REST: Edit = Edit { fragment: "RETURNING f.resource, f.prior_tx", ..END_OF_COMMENT };
}

pub mod sqlite {
    use super::{END_OF_COMMENT, Edit, fence};

    /// As in PostgreSQL.
    pub const NO_FENCE: [Edit; 2] =
        [fence("SELECT json_extract(k.value, '$[0]'), NULL FROM json_each(?1) AS k /*"), REST];

    /// As in PostgreSQL.
    pub const SELECT: [Edit; 2] = [
        fence(
            "SELECT f.resource, f.prior_tx FROM palisade_fence AS f
             JOIN json_each(?1) AS k ON json_extract(k.value, '$[0]') = f.resource
             WHERE json_extract(k.value, '$[2]') > max(f.write_token, f.read_token)
                 OR (json_extract(k.value, '$[2]') = f.write_token AND f.write_owner IS ?2) /*",
        ),
        REST,
    ];

    pub const WITHOUT_OWNER: [Edit; 1] =
        [Edit { of: "fence", fragment: " AND f.write_owner IS excluded.write_owner", instead: "" }];

    /// As in PostgreSQL.
    pub const NO_STORE_FENCE: [Edit; 2] = [
        Edit {
            of: "store_fence",
            ..fence(
                "SELECT json_extract(k.value, '$[0]'), NULL, i.token
                 FROM json_each(?1) AS k CROSS JOIN issued AS i /*",
            )
        },
        Edit {
            of: "store_fence",
            fragment: "RETURNING resource, prior_tx, max(write_token, read_token)",
            ..REST
        },
    ];

    const REST: Edit = Edit { fragment: "RETURNING resource, prior_tx", ..END_OF_COMMENT };
}

/// Another statement in place of the one that changes the rows, which becomes a comment.
const fn fence(statement: &'static str) -> Edit {
    Edit { of: "fence", fragment: "INSERT INTO palisade_fence AS f", instead: statement }
}

const END_OF_COMMENT: Edit = Edit { of: "fence", fragment: "", instead: "*/" };
