/* The worlds that are explored, the mistakes that must be found in them, and the command line. */
#include "protocol.h"

#include <string.h>

enum { O = 1u << OWNER, A = 1u << READER_A, B = 1u << READER_B, N = 1u << NEWCOMER };
static const uint64_t MAX_STATES = 12000000; /* about 1 GB */

/* Where .revoke is false no deadline passes before the end: so are the grants of a group, until it is closed. */
static const struct config configs[] = {
    {.name = "grants",
     .what = "granted by name, two slots reused, deadlines",
     .slots = 2,
     .publishes = 3,
     .publish = MAY(GRANT_A) | MAY(GRANT_B) | MAY(GRANT_AB),
     .revoke = true},
    {.name = "anonymous",
     .what = "readers=n, one reader dies, deadlines",
     .slots = 2,
     .publishes = 2,
     .publish = MAY(ANON1_AB) | MAY(ANON2_AB) | MAY(ANON2_OA),
     .deaths = 1,
     .mortal = A | B,
     .sweepers = O | B,
     .revoke = true},
    {.name = "pass-on",
     .what = "handles passed on back and forth, one reader dies, deadlines",
     .slots = 1,
     .publishes = 2,
     .publish = MAY(GRANT_A) | MAY(GRANT_AB) | MAY(ANON2_AB),
     .passes = 2,
     .passers = O | A | B,
     .pass_targets = O | A | B,
     .deaths = 1,
     .mortal = A,
     .sweepers = B,
     .revoke = true},
    {.name = "takeover",
     .what = "granted by name; deaths; a newcomer takes the byte while others sweep",
     .slots = 1,
     .publishes = 3,
     .publish = MAY(GRANT_A) | MAY(GRANT_AB) | MAY(GRANT_N),
     .deaths = 3,
     .mortal = A | B | N,
     .sweepers = O | A | B,
     .newcomer = true,
     .revoke = true},
    {.name = "pass-on-takeover",
     .what = "passing on to a peer that dies and whose byte a newcomer takes",
     .slots = 1,
     .publishes = 2,
     .publish = MAY(GRANT_AB) | MAY(ANON2_AB),
     .passes = 2,
     .passers = O | B,
     .pass_targets = A | N,
     .deaths = 2,
     .mortal = A | B,
     .sweepers = B,
     .newcomer = true,
     .revoke = true},
    {.name = "anonymous-takeover",
     .what = "readers=n; a newcomer on a dead reader's byte",
     .slots = 1,
     .publishes = 3,
     .publish = MAY(ANON2_AB) | MAY(ANON2_AN) | MAY(ANON1_N),
     .deaths = 3,
     .mortal = A | B | N,
     .sweepers = O | B,
     .newcomer = true,
     .revoke = true},
    {.name = "alias",
     .what = "a live block sent again from another slot; a reader dies",
     .slots = 2,
     .publishes = 4,
     .publish = MAY(GRANT_A) | MAY(ALIAS_A) | MAY(ALIAS_B),
     .deaths = 1,
     .mortal = A,
     .sweepers = O,
     .revoke = true},
    {.name = "not-joined",
     .what = "passing on to a process that has not joined, which joins a byte left clean",
     .slots = 1,
     .publishes = 2,
     .publish = MAY(GRANT_A),
     .passes = 2,
     .passers = O | A,
     .pass_targets = N | B,
     .leaves = 2,
     .newcomer = true,
     .revoke = true},
    {.name = "again",
     .what = "the same handle attached again",
     .slots = 1,
     .publishes = 2,
     .publish = MAY(GRANT_AB) | MAY(ANON2_AB),
     .passes = 2,
     .passers = A | B,
     .pass_targets = A | B,
     .revoke = true,
     .reattach = true},
    {.name = "leave",
     .what = "leaving and joining while others die, sweep and publish",
     .slots = 1,
     .publishes = 2,
     .publish = MAY(GRANT_A) | MAY(GRANT_AB) | MAY(GRANT_N),
     .leaves = 2,
     .deaths = 1,
     .mortal = A | N,
     .sweepers = O | B,
     .newcomer = true},
    {.name = "everybody-dies",
     .what = "deaths of everybody, the owner too, in a row",
     .slots = 1,
     .publishes = 2,
     .publish = MAY(GRANT_AB) | MAY(ANON2_AB),
     .passes = 1,
     .passers = O | A,
     .pass_targets = B | N,
     .deaths = 4,
     .mortal = O | A | B | N,
     .sweepers = O | A | B | N,
     .newcomer = true},
    {.name = "two-slots-takeover",
     .what = "scrub word by word while the slots are reused",
     .slots = 2,
     .publishes = 4,
     .publish = MAY(GRANT_A) | MAY(ANON1_A) | MAY(GRANT_N),
     .deaths = 2,
     .mortal = A | B | N,
     .sweepers = O,
     .newcomer = true},
};
enum { CONFIGS = sizeof configs / sizeof *configs };

/* `guarantee`: the first letters of what must be reported. */
static const struct seeded {
    enum bug bug;
    const char *name, *config, *guarantee;
} bugs[] = {
    {NO_SECOND_LOOK, "no-second-look", "grants", "G1"},
    {GRANT_BEFORE_HOLD, "grant-before-hold", "grants", "G2"},
    {INC_AFTER_SCRUB, "incarnation-after-scrub", "takeover", "G3"},
    {GRANT_AFTER_RECHECK, "grant-after-recheck", "takeover", "G3"},
    {TWO_WORDS, "free-from-two-words", "grants", "G2"},
    {GEN_WRAPS, "generation-wraps", "grants", "G1"},
    {STALE_KEEPS_HOLD, "stale-keeps-hold", "grants", "G4"},
    {SCRUB_AFTER_UNLOCK, "scrub-after-unlock", "takeover", "G2"},
    {NO_L_FOR_TWO, "no-trustee-for-two-in-flight", "pass-on", "G2"},
    {X_IGNORED, "touched-ignored-by-revoke", "pass-on", "G4"},
    {T_BEFORE_HOLD, "anonymous-cleared-before-hold", "anonymous-takeover", "G2"},
    {LOCAL_GEN_UNCHECKED, "local-generation-unchecked", "grants", "G2"},
    {LOCAL_GEN_IGNORED, "local-generation-ignored", "grants", "G1"},
    {UNSEEN_GRANT_CONSUMED, "grant-consumed-unseen-at-pin", "pass-on", "G2"},
    {NO_L_BESIDE_T, "no-trustee-beside-anonymous", "pass-on", "G2"},
    {READY_DURING_SCRUB, "ready-during-scrub", "takeover", "G3"},
    {TOKEN_BEFORE_INC, "token-before-incarnation", "pass-on-takeover", "G3"},
    {LOST_PASS_CLEARS, "lost-pass-on-clears", "pass-on-takeover", "G2"},
    {EMPTY_T_UNPINNED, "anonymous-dropped-unpinned", "anonymous-takeover", "G2"},
    {NO_PUBLISH_RECHECK, "publish-without-recheck", "takeover", "G3"},
    {NO_L_FOR_NEWCOMER, "no-trustee-for-newcomer", "not-joined", "G2"},
    {LEAVE_KEEPS_INC, "leave-keeps-incarnation", "not-joined", "G3"},
    {TOOK_TWICE, "took-counted-twice", "again", "G2"},
    {LOCAL_SKIPS_TOOK, "local-attach-skips-took", "anonymous", "G4"},
    {EXCHANGE_BEFORE_GEN, "exchange-before-fields", "grants", "G1"},
    {SCRUB_SKIPS_GRANTS, "scrub-skips-grants", "takeover", "G3"},
    {REVOKE_TAKES_HOLDS, "revoke-takes-holds", "grants", "G2"},
    {REVOKE_TAKES_CLAIMED, "revoke-takes-claimed-grants", "pass-on", "G2"},
    {SWEEP_WITHOUT_LOCK, "sweep-without-lock", "takeover", "G2"},
    {SCRUB_LOOKS_CLEAN, "scrub-looks-clean", "takeover", "G3"},
};
enum { BUGS = sizeof bugs / sizeof *bugs };

struct world world;

static const char *const action_names[] = {
#define ACTION_STRING(name, text) #name,
    ACTIONS(ACTION_STRING)
#undef ACTION_STRING
};

static int list(void)
{
    for (size_t i = 0; i < CONFIGS; i++)
        printf("config\t%s\t%s\n", configs[i].name, configs[i].what);
    for (size_t i = 0; i < BUGS; i++)
        printf("bug\t%s\t%s\t%s\n", bugs[i].name, bugs[i].config, bugs[i].guarantee);
    for (size_t i = 0; i < ACTION_COUNT; i++)
        if (i != IDLE && i != PUB_SCAN_REST && i != PASS_CLEAR) /* those two are steps of mistakes only */
            printf("action\t%s\n", action_names[i]);
    return 0;
}

static int run(void)
{
    static const struct explore_model model = {sizeof(struct state), initial_state, successors, check_state,
                                               print_step};
    struct explore_result result;
    int status = explore(&model, MAX_STATES, stdout, &result);
    if (result.broken)
        printf("broken\t%s\n", result.broken);
    for (size_t i = 0; i < ACTION_COUNT; i++)
        if (result.actions[i])
            printf("taken\t%s\t%llu\n", action_names[i], (unsigned long long)result.actions[i]);
    printf("states\t%llu\ttransitions\t%llu\tdepth\t%u\n", (unsigned long long)result.states,
           (unsigned long long)result.transitions, result.depth);
    if (status < 0) {
        fprintf(stderr, "%s: not explored to the end: too many states or too little memory\n", world.config->name);
        return 2;
    }
    return result.broken ? 1 : 0;
}

/* explore list | explore CONFIG [BUG]: exits with 0 when nothing is broken, 1 when something is, 2 when it cannot
 * tell. */
int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "list"))
        return list();
    for (size_t i = 0; i < CONFIGS && argc > 1; i++)
        if (!strcmp(argv[1], configs[i].name))
            world.config = &configs[i];
    for (size_t i = 0; i < BUGS && argc > 2; i++)
        if (!strcmp(argv[2], bugs[i].name))
            world.bug = bugs[i].bug;
    if (!world.config || argc > 3 || (argc == 3 && world.bug == PROTOCOL_AS_IS)) {
        fprintf(stderr, "usage: %s list | %s CONFIG [BUG]; `list` names both\n", argv[0], argv[0]);
        return 2;
    }
    return run();
}
