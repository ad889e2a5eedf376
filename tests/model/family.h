/* A family: one model with its worlds, the mistakes that can be put in, and what every kind of step stands for. */
#ifndef SHMCAST_MODEL_FAMILY_H
#define SHMCAST_MODEL_FAMILY_H

#include <stdbool.h>

#include "explore.h"

/* `code` says what the step stands for: "function STEP STEP", several with commas between. `function` is one of native/ or
 * module.function of shmcast/, STEP a row of native/steps.h that stands in that function. In brackets: stands for none. */
struct action_row {
    const char *name, *text, *code;
};
#define NO_CODE_MISTAKE "(mistake)" /* only a mistake takes it */
#define NO_CODE_KERNEL "(kernel)"   /* not a step of ours */
#define NO_CODE_LAYOUT "(layout.h)" /* layout.h says how; nothing does it yet */

struct seeded {
    unsigned bug; /* in the family's own numbering; 0 is no mistake */
    const char *name, *config;
    const char *guarantee; /* the first letters of what must be reported */
};

struct family {
    const struct explore_model *model;
    const struct action_row *actions;
    size_t action_count;
    const struct seeded *bugs;
    size_t bug_count;
    /* Name of world i, NULL past the last one; *what it is. */
    const char *(*config_name)(size_t i, const char **what);
    void (*choose)(size_t config, unsigned bug);
};

extern const struct family slot_family, arena_family;

#endif
