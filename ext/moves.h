/* Copying bytes: memcpy for short runs, non-temporal stores for long ones. */
#ifndef FLEXKV_MOVES_H
#define FLEXKV_MOVES_H

#include <stddef.h>

/* Choose the kernels for this CPU. Called once, when the module is loaded. */
void moves_choose(void);

/* Return the chosen kernel: "avx512", "avx2" or "none". */
const char *moves_simd(void);

/* Copy one run. Stores may be non-temporal: call moves_publish before others may read them. */
void move_bytes(void *target, const void *source, size_t bytes);

/* Make every store of move_bytes of this thread visible before what this thread stores next. */
void moves_publish(void);

#endif
