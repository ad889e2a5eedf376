/* cpu.h: what shmcast wants to know about the processor. */
#ifndef SHMC_CPU_H
#define SHMC_CPU_H

#include <stdbool.h>
#include <stddef.h>

/* The processor has it and the operating system saves its registers. False on other architectures. */
bool shmc_cpu_has_avx2(void);
bool shmc_cpu_has_avx512f(void);

/* The last-level cache of the first processor. `bytes` is 0 where nobody says; `shared_by_all`: every processor that is
 * online has this same one, so far as the kernel knows (a virtual machine may be told so and not have it). Reads files:
 * ask once. */
struct shmc_cpu_cache {
    size_t bytes;
    bool shared_by_all;
};
struct shmc_cpu_cache shmc_cpu_last_cache(void);

#endif
