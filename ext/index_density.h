/* The policy LHD: what it learns, and how. */
#ifndef FLEXKV_INDEX_DENSITY_H
#define FLEXKV_INDEX_DENSITY_H

#include "index_core.h"

/* -- index_recent.c: a memory of recent keys, resident or not ---------------------------------- */

struct recent_entry {
    uint32_t tag[2];
    ref chain, older, newer;
    uint32_t value;
};

struct recent {
    struct recent_entry *entries;
    ref *buckets;
    uint32_t mask, count, capacity;
    ref oldest, newest, free;
};

bool recent_open(struct recent *recent, uint32_t capacity);
void recent_close(struct recent *recent);
struct recent_entry *recent_find(const struct recent *recent, struct key key);
void recent_touch(struct recent *recent, struct recent_entry *entry);
void recent_drop(struct recent *recent, struct recent_entry *entry);

/* Add a key that is not there; if the map is full, the oldest entry is dropped for it. */
struct recent_entry *recent_add(struct recent *recent, struct key key, uint32_t value);

/* -- index_density.c: what LHD learns ---------------------------------------------------------- */

#define CLASSES 11
#define CLASS_LAST (CLASSES - 1)
#define EPOCHS 256u
#define ANCIENT EPOCHS
#define CELLS_OF_CLASS (EPOCHS + 1) /* one more for the ancient */
#define CELLS (CLASSES * CELLS_OF_CLASS)
#define BUCKETS 20
#define ASKED_LAST 64

struct density {
    uint32_t epoch;
    uint64_t asked;              /* blocks asked for in this epoch */
    double hits[CLASSES][BUCKETS], exposed[CLASSES][BUCKETS];
    uint32_t living[CLASSES][EPOCHS]; /* samples that have not ended, by class and epoch */
    struct recent samples, markers;
    uint32_t samples_max, share;
    float worth[CELLS];          /* hits per epoch */
    uint16_t order[CELLS], rank[CELLS];
    unsigned cells;
    float bound;                 /* cells worth more than this give no victim */
    uint64_t asked_last[ASKED_LAST];
    unsigned asked_next;
};

struct density *density_new(uint32_t capacity);
void density_free(struct density *density);
void density_learn(struct density *density);
unsigned density_cell(const struct density *density, const struct place *place);
unsigned density_class_of(unsigned uses, bool last);

/* Observe a key that is asked for, or stored after that; ignore it unless it is sampled. */
void density_sample(struct density *density, struct key key, unsigned class, bool asked);

/* Begin the next epoch: let counts decay, and end samples that were not seen again. */
void density_age(struct density *density);
void density_foresee(struct density *density, const struct batch *batch, int64_t *uses);
void density_class(const struct density *density, struct place *place, uint32_t uses, bool last);

/* Treat a place as one that was never used and was filled long ago. */
void density_forget(const struct density *density, struct place *place);
float density_of_new(const struct density *density, uint32_t uses, bool last);
const char *density_check(const struct density *density);

/* -- index_lhd.c ------------------------------------------------------------------------------- */

/* Learn from a prompt; `nodes` has the nodes of its first `known` blocks, `reach` the leaves that
 * are used (NULL: none). */
void lhd_asked(struct block_index *index, unsigned tier, const struct batch *prompt,
               const ref *nodes, size_t known, const struct reach *reach);

#endif
