/* The choice of the kernel, and the kernel that runs on every CPU. */
#include "sums.h"

#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

_Static_assert(sizeof(XXH3_state_t) <= sizeof(struct sum), "the state of XXH3 has grown");

void sum_begin(struct sum *sum, uint64_t seed)
{
    memset(sum, 0, sizeof(*sum)); /* the reset reads the old content */
    XXH3_64bits_reset_withSeed((XXH3_state_t *)sum, seed);
}

static void sum_add_plain(struct sum *sum, const void *data, size_t bytes)
{
    XXH3_64bits_update((XXH3_state_t *)sum, data, bytes);
}

uint64_t sum_end(const struct sum *sum)
{
    return XXH3_64bits_digest((const XXH3_state_t *)sum);
}

sum_kernel *sum_add = sum_add_plain;

void sums_choose(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f"))
        sum_add = sum_add_avx512;
    else if (__builtin_cpu_supports("avx2"))
        sum_add = sum_add_avx2;
#endif
}
