/* Random 64-byte lines from a large array: what NumPy cannot ask for, software prefetch.
 * limits.py compiles it where a C compiler is at hand. */
#include <stddef.h>
#include <stdint.h>

#define STAGE 64

uint64_t plain(const uint64_t *lines, const uint32_t *ids, size_t count) {
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i++) sum += lines[(size_t)ids[i] * 8];
    return sum;
}

uint64_t prefetched(const uint64_t *lines, const uint32_t *ids, size_t count) {
    uint64_t sum = 0;
    for (size_t begin = 0; begin + STAGE <= count; begin += STAGE) {
        for (size_t i = begin; i < begin + STAGE; i++) __builtin_prefetch(&lines[(size_t)ids[i] * 8]);
        for (size_t i = begin; i < begin + STAGE; i++) sum += lines[(size_t)ids[i] * 8];
    }
    return sum;
}
