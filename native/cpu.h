/* cpu.h: what shmcast wants to know about the processor. */
#ifndef SHMC_CPU_H
#define SHMC_CPU_H

#include <stdbool.h>
#include <stddef.h>

/* The processor has it and the operating system saves its registers. False on other architectures. */
bool shmc_cpu_has_avx2(void);
bool shmc_cpu_has_avx512f(void);

/* Size of the last-level cache that the first processor sees, in bytes; 0 where nobody says. Reads files: ask once. */
size_t shmc_cpu_cache_bytes(void);

#endif
