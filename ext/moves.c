/* Copy kernels: memcpy for what should stay in the cache, non-temporal stores for long runs.
 *
 * A non-temporal store writes whole cache lines past the cache, so the target's old content is not
 * read first: three memory transfers become two. It needs an aligned target; memcpy copies the
 * unaligned head and the tail. */
#include "moves.h"

#include <stdint.h>
#include <string.h>

/* For fewer bytes memcpy is faster; measured, see README.md. */
#define STREAM_BYTES_MIN 1024

#define LINE_BYTES 64
#define STEP_BYTES 128

#if defined(__x86_64__)
#include <immintrin.h>

typedef void stream_kernel(char *target, const char *source, size_t bytes);

__attribute__((target("avx2"))) static void stream_avx2(char *target, const char *source,
                                                        size_t bytes)
{
    for (size_t at = 0; at < bytes; at += STEP_BYTES) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(source + at));
        __m256i b = _mm256_loadu_si256((const __m256i *)(source + at + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(source + at + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(source + at + 96));

        _mm256_stream_si256((__m256i *)(target + at), a);
        _mm256_stream_si256((__m256i *)(target + at + 32), b);
        _mm256_stream_si256((__m256i *)(target + at + 64), c);
        _mm256_stream_si256((__m256i *)(target + at + 96), d);
    }
}

__attribute__((target("avx512f"))) static void stream_avx512(char *target, const char *source,
                                                             size_t bytes)
{
    size_t at = 0;

    for (; at + 4 * LINE_BYTES <= bytes; at += 4 * LINE_BYTES) {
        __m512i a = _mm512_loadu_si512(source + at);
        __m512i b = _mm512_loadu_si512(source + at + 64);
        __m512i c = _mm512_loadu_si512(source + at + 128);
        __m512i d = _mm512_loadu_si512(source + at + 192);

        _mm512_stream_si512((void *)(target + at), a);
        _mm512_stream_si512((void *)(target + at + 64), b);
        _mm512_stream_si512((void *)(target + at + 128), c);
        _mm512_stream_si512((void *)(target + at + 192), d);
    }
    for (; at < bytes; at += LINE_BYTES)
        _mm512_stream_si512((void *)(target + at), _mm512_loadu_si512(source + at));
}

static stream_kernel *stream;
static const char *simd = "none";

void moves_choose(void)
{
    if (__builtin_cpu_supports("avx512f")) {
        stream = stream_avx512;
        simd = "avx512";
    } else if (__builtin_cpu_supports("avx2")) {
        stream = stream_avx2;
        simd = "avx2";
    }
}

const char *moves_simd(void)
{
    return simd;
}

void move_bytes(void *target, const void *source, size_t bytes)
{
    char *to = target;
    const char *from = source;
    size_t head, body;

    if (!stream || bytes < STREAM_BYTES_MIN) {
        memcpy(to, from, bytes);
        return;
    }
    head = -(uintptr_t)to % LINE_BYTES;
    memcpy(to, from, head);
    body = (bytes - head) / STEP_BYTES * STEP_BYTES;
    stream(to + head, from + head, body);
    memcpy(to + head + body, from + head + body, bytes - head - body);
}

void moves_publish(void)
{
    _mm_sfence();
}

#else

void moves_choose(void)
{
}

const char *moves_simd(void)
{
    return "none";
}

void move_bytes(void *target, const void *source, size_t bytes)
{
    memcpy(target, source, bytes);
}

void moves_publish(void)
{
    __atomic_thread_fence(__ATOMIC_RELEASE);
}

#endif
