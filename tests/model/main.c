/* The command line: one world of one family is explored, as it is or with one mistake put in. */
#include "family.h"

#include <string.h>

static const uint64_t MAX_STATES = 12000000; /* about 1 GB */
static const struct family *const families[] = {&slot_family, &arena_family};
enum { FAMILIES = sizeof families / sizeof *families };

static int list(void)
{
    for (size_t f = 0; f < FAMILIES; f++) {
        const struct family *family = families[f];
        const char *name, *what;
        for (size_t i = 0; (name = family->config_name(i, &what)); i++)
            printf("config\t%s\t%s\n", name, what);
        for (size_t i = 0; i < family->bug_count; i++)
            printf("bug\t%s\t%s\t%s\n", family->bugs[i].name, family->bugs[i].config, family->bugs[i].guarantee);
        for (size_t i = 0; i < family->action_count; i++)
            if (strcmp(family->actions[i].code, NO_CODE_MISTAKE) != 0)
                printf("action\t%s\t%s\n", family->actions[i].name, family->actions[i].code);
    }
    return 0;
}

static int run(const struct family *family, const char *config)
{
    struct explore_result result;
    int status = explore(family->model, MAX_STATES, stdout, &result);
    if (result.broken)
        printf("broken\t%s\n", result.broken);
    for (size_t i = 0; i < family->action_count; i++)
        if (result.actions[i])
            printf("taken\t%s\t%llu\n", family->actions[i].name, (unsigned long long)result.actions[i]);
    printf("states\t%llu\ttransitions\t%llu\tdepth\t%u\n", (unsigned long long)result.states,
           (unsigned long long)result.transitions, result.depth);
    if (status < 0) {
        fprintf(stderr, "%s: not explored to the end: too many states or too little memory\n", config);
        return 2;
    }
    return result.broken ? 1 : 0;
}

/* Chooses the world, and the mistake where one is named; false where this family knows one of them not. */
static bool choose(const struct family *family, const char *config, const char *bug)
{
    const char *name, *what;
    size_t world = 0, mistake = 0;
    while ((name = family->config_name(world, &what)) && strcmp(name, config) != 0)
        world++;
    while (bug && mistake < family->bug_count && strcmp(family->bugs[mistake].name, bug) != 0)
        mistake++;
    if (!name || (bug && mistake == family->bug_count))
        return false;
    family->choose(world, bug ? family->bugs[mistake].bug : 0);
    return true;
}

/* explore list | explore CONFIG [BUG]: exits with 0 when nothing is broken, 1 when something is, 2 when it cannot
 * tell. */
int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "list"))
        return list();
    for (size_t f = 0; f < FAMILIES && (argc == 2 || argc == 3); f++)
        if (choose(families[f], argv[1], argc == 3 ? argv[2] : NULL))
            return run(families[f], argv[1]);
    fprintf(stderr, "usage: %s list | %s CONFIG [BUG]; `list` names both\n", argv[0], argv[0]);
    return 2;
}
