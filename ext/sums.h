/* XXH3-64 of a chunk that is given in parts, with the widest vectors that this CPU has. Knows no
 * Python. */
#ifndef FLEXKV_SUMS_H
#define FLEXKV_SUMS_H

#include <stddef.h>
#include <stdint.h>

struct sum {
    _Alignas(64) unsigned char state[640]; /* an XXH3_state_t, whatever the release */
};

typedef void sum_kernel(struct sum *sum, const void *data, size_t bytes);

void sum_begin(struct sum *sum, uint64_t seed);

/* Add more bytes. All kernels compute the same sum. */
extern sum_kernel *sum_add;

uint64_t sum_end(const struct sum *sum);

/* Choose the kernel; once, at import. */
void sums_choose(void);

sum_kernel sum_add_avx2, sum_add_avx512;

#endif
