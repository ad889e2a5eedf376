/* Several processes add to one block at once, as closely as C can: a peak never falls, and no addition is lost.
 * Usage: metrics_check PROCESSES ROUNDS; prints what is wrong and ends with 1, or one line and 0. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "metrics.h"

static shmc_atomic_u64 *block;
static shmc_atomic_u64 *ready;

static struct shmc_histogram *histogram(void)
{
    return (struct shmc_histogram *)&block[shmc_metric_rows[SHMC_METRIC_step_ns].first_word];
}

/* Starts with all the others; 0 where every peak was at least what this process had raised it to. */
static int count_and_look(uint64_t processes, uint64_t rank, uint64_t rounds)
{
    int fell = 0;
    shmc_relaxed_add(ready, 1);
    while (shmc_relaxed_load(ready) != processes) {
    }
    for (uint64_t round = 0; round < rounds; round++) {
        uint64_t value = round * processes + rank;
        shmc_metric_add(block, SHMC_METRIC_requests, 1);
        shmc_metric_peak(block, SHMC_METRIC_peak_pending, value);
        fell |= shmc_metric_get(block, SHMC_METRIC_peak_pending) < value;
        shmc_metric_observe(block, SHMC_METRIC_step_ns, value);
        fell |= shmc_relaxed_load(&histogram()->max) < value;
    }
    return fell;
}

static int wrong(const char *what, uint64_t found, uint64_t expected)
{
    if (found != expected) {
        printf("metrics_check: %s: %llu, expected %llu\n", what, (unsigned long long)found,
               (unsigned long long)expected);
    }
    return found != expected;
}

int main(int count, char **arguments)
{
    if (count != 3) {
        return 2;
    }
    uint64_t processes = strtoull(arguments[1], NULL, 10), rounds = strtoull(arguments[2], NULL, 10);
    block = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (block == MAP_FAILED) {
        return 2;
    }
    ready = block + 512;
    for (uint64_t rank = 0; rank < processes; rank++) {
        pid_t pid = fork();
        if (pid == 0) {
            _exit(count_and_look(processes, rank, rounds));
        }
        if (pid < 0) {
            return 2;
        }
    }
    int fell = 0, status;
    while (wait(&status) > 0) {
        fell |= status != 0;
    }
    uint64_t all = processes * rounds, in_buckets = 0;
    for (unsigned bucket = 0; bucket < SHMC_METRIC_BUCKETS; bucket++) {
        in_buckets += shmc_relaxed_load(&histogram()->buckets[bucket]);
    }
    int bad = wrong("times that a peak fell", (uint64_t)fell, 0);
    bad |= wrong("counter", shmc_metric_get(block, SHMC_METRIC_requests), all);
    bad |= wrong("peak", shmc_metric_get(block, SHMC_METRIC_peak_pending), all - 1);
    bad |= wrong("observations", in_buckets, all);
    bad |= wrong("sum", shmc_relaxed_load(&histogram()->sum), all * (all - 1) / 2);
    bad |= wrong("largest", shmc_relaxed_load(&histogram()->max), all - 1);
    if (!bad) {
        printf("metrics_check: ok\n");
    }
    return bad;
}
