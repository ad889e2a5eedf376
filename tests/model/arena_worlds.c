/* The worlds in which an arena's life is explored, and the mistakes that must be found in them. */
#include "arena.h"

enum { O = 1u << OWNER, S1 = 1u << SWEEPER_1, S2 = 1u << SWEEPER_2, R = 1u << READER };

static const struct config configs[] = {
    {.name = "create",
     .what = "an arena is created while two sweepers list, look and unlink; anybody dies",
     .files = 1,
     .max = 1,
     .closes = true,
     .may_be_full = true,
     .sweeps = 3,
     .deaths = 2,
     .mortal = O | S1 | S2},
    {.name = "sweep",
     .what = "the owner grows and gives back, dies anywhere; two sweepers, of whom one dies as well",
     .created = true,
     .files = 3,
     .max = 2,
     .closes = true,
     .may_be_full = true,
     .sweeps = 4,
     .deaths = 3,
     .mortal = O | S1 | S2},
    {.name = "by-hand",
     .what = "somebody removes a dead owner's control segment by hand",
     .created = true,
     .files = 2,
     .max = 2,
     .by_hand = true,
     .sweeps = 4,
     .deaths = 2,
     .mortal = O | S1},
    {.name = "read",
     .what = "a reader joins, attaches and maps while the owner grows, gives back and ends",
     .created = true,
     .files = 3,
     .max = 2,
     .publishes = 3,
     .closes = true,
     .deaths = 1,
     .mortal = R},
    {.name = "pin",
     .what = "a reader registers pages with a driver while the owner gives segments back",
     .created = true,
     .files = 3,
     .max = 2,
     .publishes = 2,
     .pins = true,
     .scrubs = true,
     .deaths = 2,
     .mortal = R | S1},
    {.name = "tight",
     .what = "one segment at a time: what is given back makes room for the next",
     .created = true,
     .files = 3,
     .max = 1,
     .publishes = 3,
     .pins = true},
    {.name = "read-swept",
     .what = "a reader joins and attaches while the owner ends or dies and two sweepers come",
     .created = true,
     .files = 2,
     .max = 2,
     .publishes = 2,
     .closes = true,
     .sweeps = 2,
     .deaths = 2,
     .mortal = O | S1},
    {.name = "whole-life",
     .what = "from its creation to its end, with a reader and two sweepers; anybody dies",
     .files = 2,
     .max = 1,
     .publishes = 2,
     .closes = true,
     .may_be_full = true,
     .pins = true,
     .scrubs = true,
     .sweeps = 2,
     .deaths = 3,
     .mortal = O | S1 | R},
};

static const struct seeded bugs[] = {
    {CREATE_CURRENT_UNCHECKED, "create-current-unchecked", "create", "A1"},
    {MAGIC_FIRST, "magic-first", "create", "A6"},
    {LOCK_NOT_ANCHORED, "lock-not-anchored", "sweep", "A2"},
    {KNOWN_BEFORE_RESERVED, "segment-known-before-reserved", "read", "A6"},
    {NUMBER_BEFORE_SIZE, "number-before-size", "read", "A6"},
    {NUMBER_REUSED, "number-reused", "read", "A4"},
    {GROW_BEFORE_RETIRE, "grow-before-give-back", "tight", "A5"},
    {RETIRE_IN_USE, "give-back-in-use", "read", "A4"},
    {RETIRE_IGNORES_MARKS, "give-back-ignores-marks", "pin", "A8"},
    {RETIRE_ONLY_LOOKS, "give-back-only-looks", "pin", "A8"},
    {RETIRE_WITHOUT_PUNCH, "give-back-without-punch", "tight", "A5"},
    {RETIRE_UNLINKS_FIRST, "give-back-unlinks-first", "read", "A6"},
    {PIN_LOOKS_ONCE, "pin-looks-once", "pin", "A8"},
    {SCRUB_FORGETS_MARKS, "scrub-forgets-marks", "pin", "A3"},
    {END_UNLINKS_FIRST, "end-unlinks-first", "read", "A7"},
    {END_CONTROL_FIRST, "control-unlinked-first", "sweep", "A3"},
    {SWEEP_PROBES, "sweeper-probes", "create", "A2"},
    {SWEEP_CURRENT_UNCHECKED, "sweeper-current-unchecked", "create", "A2"},
    {SWEEP_LETS_GO_EARLY, "sweeper-lets-go-early", "sweep", "A2"},
    {SWEEP_LISTS_ONCE, "sweeper-lists-before-lock-only", "sweep", "A3"},
    {SWEEP_BY_RECORDS, "sweeper-goes-by-records", "sweep", "A3"},
    {SWEEP_LOOKS_BEFORE_LIST, "sweeper-looks-before-list", "create", "A1"},
    {SWEEP_LEAVES_ORPHANS, "sweeper-leaves-orphans", "by-hand", "A3"},
    {SWEEP_CONTROL_FIRST, "sweeper-unlinks-control-first", "sweep", "A3"},
    {SWEEP_UNMARKED, "sweeper-does-not-mark", "read-swept", "A7"},
    {ATTACH_SKIPS_STATE, "attach-skips-state", "read-swept", "A7"},
};

static const struct action_row actions[] = {
#define ACTION_ROW(name, text, code) {#name, text, code},
    ACTIONS(ACTION_ROW)
#undef ACTION_ROW
};

static const char *config_name(size_t i, const char **what)
{
    if (i >= sizeof configs / sizeof *configs)
        return NULL;
    *what = configs[i].what;
    return configs[i].name;
}

static void choose(size_t config, unsigned bug)
{
    arena_world = (struct arena_world){&configs[config], (enum bug)bug};
}

struct arena_world arena_world;

static const struct explore_model model = {sizeof(struct state), arena_initial, arena_successors, arena_check,
                                           arena_print};

const struct family arena_family = {
    .model = &model,
    .actions = actions,
    .action_count = sizeof actions / sizeof *actions,
    .bugs = bugs,
    .bug_count = sizeof bugs / sizeof *bugs,
    .config_name = config_name,
    .choose = choose,
};
