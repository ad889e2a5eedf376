#include "cpu.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__)
/* the compiler's run-time library asks cpuid and xgetbv */
bool shmc_cpu_has_avx2(void)
{
    return __builtin_cpu_supports("avx2");
}

bool shmc_cpu_has_avx512f(void)
{
    return __builtin_cpu_supports("avx512f");
}
#else
bool shmc_cpu_has_avx2(void)
{
    return false;
}

bool shmc_cpu_has_avx512f(void)
{
    return false;
}
#endif

/* The first line of a file of the kernel's, without its end; false where there is none. */
static bool read_line(const char *path, char *line, size_t line_bytes)
{
    FILE *file = fopen(path, "re");
    if (!file) {
        return false;
    }
    bool read = fgets(line, (int)line_bytes, file) != NULL;
    fclose(file);
    if (read) {
        line[strcspn(line, "\n")] = 0;
    }
    return read;
}

/* One cache of the first processor as the kernel reports it, its size as in "32768K". */
static struct shmc_cpu_cache cache_of_index(int index)
{
    char path[80], size[32], sharers[1024], online[1024];
    struct shmc_cpu_cache cache = {0};
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
    if (read_line(path, size, sizeof size)) {
        char *unit;
        cache.bytes = strtoul(size, &unit, 10);
        cache.bytes <<= *unit == 'K' ? 10 : *unit == 'M' ? 20 : 0;
    }
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/shared_cpu_list", index);
    cache.shared_by_all = read_line(path, sharers, sizeof sharers) &&
                          read_line("/sys/devices/system/cpu/online", online, sizeof online) &&
                          strcmp(sharers, online) == 0;
    return cache;
}

struct shmc_cpu_cache shmc_cpu_last_cache(void)
{
    struct shmc_cpu_cache last = {0};
    for (int index = 0; index < 8; index++) {
        struct shmc_cpu_cache cache = cache_of_index(index);
        if (cache.bytes > last.bytes) {
            last = cache;
        }
    }
#if defined(_SC_LEVEL3_CACHE_SIZE)
    if (last.bytes == 0) { /* no sysfs, as in some sandboxes */
        long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
        last = (struct shmc_cpu_cache){.bytes = bytes > 0 ? (size_t)bytes : 0, .shared_by_all = true};
    }
#endif
    return last;
}
