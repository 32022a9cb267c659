/* What the policy "lifetime" learns from: when blocks of each class are asked for again.
 *
 * A class says how a block was last asked for: at which turn of its conversation (a request that
 * continues a known prompt is one turn later), near the end of the prompt or not, known before or
 * not; or that many prompts share it. A bounded table remembers blocks, resident or not, by key, in
 * sets of four of which the one used longest ago makes way. Each memory ends in a use (a hit at
 * some age) or in making way; the counts of both, by class and age, are what the lifetimes are
 * worked out from.
 */
#include "index_core.h"

#include <stdlib.h>

#define WAYS 4
#define TURN_SECONDS_MIN 1

static bool remembers(const struct memory *memory, struct key key)
{
    return memory->turn && memory->tag == key.word[3];
}

/* The memory of a block, or the one that would make way for it. */
static struct memory *memory_at(const struct adapt *adapt, struct key key)
{
    struct memory *set = &adapt->memories[(key.word[2] & adapt->mask) / WAYS * WAYS], *found = set;

    for (struct memory *at = set; at < set + WAYS; at++) {
        if (remembers(at, key))
            return at;
        if (!at->turn || (found->turn && at->used_s < found->used_s))
            found = at;
    }
    return found;
}

bool adapt_open(struct adapt *adapt, uint64_t blocks)
{
    uint64_t count = MEMORIES_MIN;

    while (count < 2 * blocks && count < MEMORIES_MAX)
        count *= 2;
    adapt->mask = (uint32_t)(count - 1);
    adapt->memories = calloc(count, sizeof(*adapt->memories));
    return adapt->memories;
}

/* Ages in bins whose bounds grow by the square root of two, from one second on. */
unsigned age_bin(uint32_t age_s)
{
    unsigned log;

    if (!age_s)
        return 0;
    log = 31 - (unsigned)__builtin_clz(age_s);
    /* Past the geometric middle of two powers: 1.414 is 362 in 256ths. */
    log = 1 + 2 * log + ((uint64_t)age_s * 256 >= (uint64_t)362 << log);
    return log < AGE_BINS ? log : AGE_BINS - 1;
}

static void memory_end(struct adapt *adapt, const struct memory *memory, uint32_t now_s, bool hit)
{
    uint32_t age_s = now_s - memory->used_s;
    struct ages *ages = &adapt->ended[memory->class];
    unsigned bin = age_bin(age_s);

    ages->count[bin]++;
    ages->sum_s[bin] += age_s;
    adapt->hits[memory->class][bin] += hit;
}

static unsigned class_of(const struct memory *memory, uint8_t turn, bool tail, bool known)
{
    if (memory->children >= SHARED_CHILDREN)
        return CLASS_SHARED;
    return (turn - 1u) * 4 + (tail ? 2 : 0) + known;
}

/* How many leading blocks are remembered, and which turn of their conversation this is. Asked for
 * again within the same second it is the same turn: a match before its get, or a retry. */
static size_t known_blocks(const struct adapt *adapt, const unsigned char *keys, size_t blocks,
                           bool use, uint32_t now_s, uint8_t *turn)
{
    size_t known = 0;

    *turn = 1;
    while (known < blocks) {
        struct key key = key_at(keys, (int64_t)known);
        const struct memory *memory = memory_at(adapt, key);

        if (!remembers(memory, key))
            break;
        *turn = memory->turn;
        if (memory->children >= SHARED_CHILDREN)
            *turn = 1;
        else if (use && now_s - memory->used_s >= TURN_SECONDS_MIN && *turn < TURNS_MAX)
            ++*turn;
        known++;
    }
    return known;
}

void adapt_request(struct adapt *adapt, const unsigned char *keys, size_t blocks, bool use,
                   uint32_t now_s)
{
    struct memory *parent = NULL;
    uint8_t turn;
    size_t known = known_blocks(adapt, keys, blocks, use, now_s, &turn);

    for (size_t position = 0; position < blocks; position++) {
        struct key key = key_at(keys, (int64_t)position);
        struct memory *memory = memory_at(adapt, key);
        bool is_known = position < known;

        if (is_known && !use) {
            parent = memory;
            continue;
        }
        if (!is_known) {
            if (memory->turn)
                memory_end(adapt, memory, now_s, false);
            *memory = (struct memory){.tag = key.word[3]};
            if (parent && parent != memory && parent->children < SHARED_CHILDREN)
                parent->children++;
        } else {
            memory_end(adapt, memory, now_s, true);
        }
        memory->used_s = now_s;
        memory->turn = memory->children >= SHARED_CHILDREN ? 1 : turn;
        memory->class = (uint8_t)class_of(memory, turn, position + 2 >= blocks, is_known);
        adapt->uses[memory->class]++;
        parent = memory;
    }
    /* The block that was continued may have become one that many share. */
    if (known && known < blocks) {
        struct memory *last = memory_at(adapt, key_at(keys, (int64_t)known - 1));

        if (last->children >= SHARED_CHILDREN)
            last->class = CLASS_SHARED;
    }
}

unsigned adapt_class(const struct adapt *adapt, struct key key)
{
    const struct memory *memory = memory_at(adapt, key);

    return remembers(memory, key) ? memory->class : 0;
}

void adapt_living(const struct adapt *adapt, uint32_t now_s, struct ages *living)
{
    for (size_t i = 0; i <= adapt->mask; i++) {
        const struct memory *memory = &adapt->memories[i];
        uint32_t age_s = now_s - memory->used_s;

        if (!memory->turn)
            continue;
        living[memory->class].count[age_bin(age_s)]++;
        living[memory->class].sum_s[age_bin(age_s)] += age_s;
    }
}
