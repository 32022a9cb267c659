/* Hints without Python: which holder is said to have which span. See README.md, "Hints". */
#ifndef FLEXKV_HINTS_H
#define FLEXKV_HINTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define HOLDERS_MAX 4096
#define STORE 0 /* the holder that is the remote store; all others are nodes */
#define LINE_PAIRS 8
#define COPIES_MAX 4 /* nodes remembered for one span: no reader needs all copies of a hot one */
#define DOUBT_TICKS_MAX 4095
#define HINTS_KEY_BYTES 16

/* A span, one of its holders, and what is known of that; 0 is no pair. */
typedef uint64_t pair;

#define PAIR_TAG UINT64_C(0xffffffff) /* of the span's key, never 0 */
#define PAIR_HOLDER_SHIFT 32
#define PAIR_NAME ((UINT64_C(1) << 44) - 1) /* the tag and the holder */
#define PAIR_TIER_SHIFT 44
#define PAIR_ROUND_SHIFT 45
#define PAIR_DOUBT_SHIFT 46 /* 0, or 1 + the tick at which a doubt ends, modulo DOUBT_PERIOD */
#define DOUBT_PERIOD ((INT64_C(1) << 18) - 1)

struct line {
    pair pairs[LINE_PAIRS];
};

/* What is known of a holder. */
struct holder {
    uint32_t pairs;  /* all of it that are in the table */
    uint32_t unseen;  /* those not noted since its round began */
    bool retired;    /* all its pairs are dead */
    bool is_down;    /* runs do not name it for now */
    bool in_round;   /* if not, its unseen pairs are dead */
    uint8_t round;   /* 0 and 1 in turn; pairs that have the other one are unseen */
};

/* Who a run may name. */
enum use { USE_STORE = 1, USE_NODES = 2 };

/* Keys that are `size` bytes apart. Only the first 8 bytes of each are read. */
struct keys {
    const unsigned char *bytes;
    size_t count, size;
};

struct hints {
    struct line *lines;
    size_t bytes;
    uint64_t line_count;
    uint32_t span_blocks;
    uint32_t turn;       /* which pair is displaced next */
    int64_t clock;       /* in ticks */
    uint64_t cursor;     /* the line at which a scrub goes on */
    uint64_t pairs;      /* dead ones included */
    uint64_t dead;       /* pairs that are never returned, and not removed yet */
    uint64_t lost;       /* pairs that others have displaced */
    struct holder holders[HOLDERS_MAX];
};

/* Return whether there is memory; errno says why not. */
bool hints_open(struct hints *hints, uint64_t pairs_max, uint32_t span_blocks);
void hints_close(struct hints *hints);

/* Add, remove or doubt pairs; return how many were added, removed, doubted. */
size_t hints_note(struct hints *hints, struct keys keys, unsigned holder, unsigned tier);
size_t hints_drop(struct hints *hints, struct keys keys, unsigned holder);
size_t hints_doubt(struct hints *hints, struct keys keys, unsigned holder, unsigned ticks);

/* Set a byte for each key: whether the holder is said to have it, in doubt or not; with `usable`,
 * whether a run would name it. */
void hints_know(struct hints *hints, struct keys keys, unsigned holder, bool usable,
                uint8_t *known);

/* Set for each key, of spans that do not follow each other, the number of a node that may be asked
 * for it, as in a run; -1 if there is none. */
void hints_nodes(struct hints *hints, struct keys keys, int64_t *ids);

/* Fill `found` with a pair for each span from that of block `first` up to that of block `last`,
 * exclusive, until one is unknown; return their number. `prompt` has the root and the keys of all
 * blocks of a prompt; it counts the blocks. */
size_t hints_run(struct hints *hints, struct keys prompt, size_t first, size_t last, unsigned use,
                 pair *found);

static inline int64_t pair_holder(pair pair)
{
    return (int64_t)(pair >> PAIR_HOLDER_SHIFT & (HOLDERS_MAX - 1));
}

/* Return the number that a run has for each block of a span: holder + tier * HOLDERS_MAX. */
static inline int64_t pair_id(pair pair)
{
    return pair_holder(pair) + (int64_t)(pair >> PAIR_TIER_SHIFT & 1) * HOLDERS_MAX;
}

/* Return how many of a holder's pairs are dead. */
uint32_t holder_dead(const struct holder *holder);

/* Each returns the rule that forbids it, or NULL. */
const char *holder_retire(struct hints *hints, unsigned holder);
const char *holder_revive(struct hints *hints, unsigned holder);
const char *round_begin(struct hints *hints, unsigned holder);
const char *round_end(struct hints *hints, unsigned holder);

/* Remove the dead pairs of some lines; return how many dead pairs are left in all. */
uint64_t hints_scrub(struct hints *hints, uint64_t lines);

/* Remove all pairs. */
void hints_clear(struct hints *hints);

#endif
