/* The block index without Python: nodes, places, policies. See README.md, "Index".
 *
 * A node is a block's identity: its key, its parent, its children. A place is room for one block in
 * one tier. Both are known by number; NONE is no number.
 */
#ifndef FLEXKV_INDEX_CORE_H
#define FLEXKV_INDEX_CORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TIERS_MAX 4
#define LISTS_MAX 64
#define NONE UINT32_MAX
#define INDEX_KEY_BYTES ((size_t)16)

typedef uint32_t ref;

enum place_state { PLACE_FREE, PLACE_RESERVED, PLACE_READY, PLACE_DRAINING };

/* Where a READY place is when it is in no list: found unfit to go, waiting to be fit again. */
#define LIST_PARKED 254
/* What is not READY is in no list. */
#define LIST_NONE 255

struct key {
    uint32_t word[4];
};

/* 44 bytes and a reference for each tier. A root has no block: it stands for a namespace. */
struct node {
    struct key key;
    uint32_t bucket;    /* where its chain begins */
    ref chain;          /* the next in the same bucket, or in the list of free nodes */
    ref parent;         /* NONE for a root; NODE_FREE when the node is free */
    ref child;          /* the first child */
    ref before, after;  /* siblings */
    ref root;           /* the namespace; its own number for a root */
    ref place[];        /* by tier; for a root, how many blocks of it the tier has */
};

#define NODE_FREE (UINT32_MAX - 1)

struct place {
    ref node;           /* NONE: it is under no key */
    ref older, newer;   /* in the policy's list while READY; the filler's token while RESERVED */
    uint32_t pins;
    uint32_t used_s;    /* LIFETIME: when it was last used, by the clock */
    uint8_t state, list;
    uint8_t uses;       /* LIFETIME: its class */
};

struct list {
    ref oldest, newest;
    uint32_t count;
};

enum policy_kind { POLICY_LRU, POLICY_FIFO, POLICY_MRU, POLICY_FILO, POLICY_LFU, POLICY_SLRU,
                   POLICY_REWARD, POLICY_LIFETIME, POLICY_KINDS };

/* -- what LIFETIME learns from: index_adapt.c -------------------------------------------------- */

#define TURNS_MAX 7
#define SHARED_CHILDREN 3
#define CLASS_SHARED (TURNS_MAX * 4)
#define CLASSES (CLASS_SHARED + 1)
#define AGE_BINS 26
#define MEMORIES_MIN (UINT64_C(1) << 18)
#define MEMORIES_MAX (UINT64_C(1) << 22)

struct memory {
    uint32_t tag, used_s;
    uint8_t turn;       /* from 1 on; 0 when the slot is empty */
    uint8_t class, children;
};

struct ages {
    uint64_t count[AGE_BINS], sum_s[AGE_BINS];
};

struct adapt {
    struct memory *memories;     /* NULL: nothing is learnt */
    uint32_t mask;
    uint64_t uses[CLASSES], hits[CLASSES][AGE_BINS];
    struct ages ended[CLASSES];
};

struct policy {
    enum policy_kind kind;
    uint32_t parameter;          /* SLRU: uses that protect; REWARD: seconds a use is worth */
    uint32_t protected_max;      /* SLRU */
    uint64_t first_bucket;       /* REWARD: the bucket of time in which the clock is */
    uint64_t occupied;           /* which lists have members */
    float lifetime_s[CLASSES];   /* LIFETIME: how long each class is worth its place */
    struct list lists[LISTS_MAX];
};

struct tier {
    struct place *places;
    size_t places_bytes;
    uint32_t places_max, capacity;
    uint32_t unused;             /* places from here on were never taken */
    ref free_places;             /* a stack, linked by `older` */
    uint32_t free, reserved, ready, draining, pinned;
    uint32_t evict_blocks;       /* an eviction takes at least so many */
    uint64_t evicted;
    struct policy policy;
};

struct block_index {
    unsigned tiers;
    size_t node_bytes;
    char *nodes;
    size_t nodes_bytes;
    uint32_t nodes_unused;
    ref free_nodes;
    ref *buckets;
    size_t buckets_bytes;
    uint32_t page_mask;
    uint32_t clock_s;
    struct adapt adapt;
    struct tier tier[TIERS_MAX];
    const char *broken;          /* the law that a failed call broke */
};

static inline struct node *node_at(const struct block_index *index, ref node)
{
    return (struct node *)(index->nodes + (size_t)node * index->node_bytes);
}

/* -- index_table.c: memory, keys, families ----------------------------------------------------- */

/* Take the memory; false with errno. */
bool index_open(struct block_index *index, unsigned tiers, const uint32_t *capacities);
void index_close(struct block_index *index);
/* The keys of one request: a root, then those of its blocks. Position p is the p-th block. */
static inline struct key key_at(const unsigned char *keys, int64_t position)
{
    struct key key;

    memcpy(&key, keys + (position + 1) * (int64_t)INDEX_KEY_BYTES, sizeof(key));
    return key;
}

/* The bucket of a block. The buckets of PAGE consecutive blocks of a prompt are in one cache line,
 * which the key of the first of them chooses; so neighbours share the miss. */
uint32_t bucket_at(const struct block_index *index, const unsigned char *keys, int64_t position);
uint32_t bucket_of_root(const struct block_index *index, struct key key);
#define PAGE 16

/* Ask for the memory in which the block at a position will be looked up, ahead of time. */
void bucket_expect(const struct block_index *index, const unsigned char *keys, int64_t position);
#define EXPECT_AHEAD 32

bool node_has(const struct block_index *index, ref number, struct key key);

/* The node of a key, or NONE. Blocks that came together have neighbouring nodes, so the number
 * after `before`, the node of the block before, is a good guess; its first child is the second. */
ref node_guess(const struct block_index *index, struct key key, ref before);
ref node_find(const struct block_index *index, struct key key, uint32_t bucket);

/* The nodes of the blocks from begin to end, up to the first that is nowhere: behind it none is
 * anywhere. Gives how many. */
size_t nodes_find(const struct block_index *index, const unsigned char *keys, size_t begin,
                  size_t end, ref *nodes);
ref node_add(struct block_index *index, struct key key, uint32_t bucket, ref parent);

/* Take a node out of its family, and put it back: what an eviction does and undoes. */
void node_leave(struct block_index *index, ref node);
void node_join(struct block_index *index, ref node);

/* Free a node that has left its family. */
void node_free(struct block_index *index, ref node);

/* -- index_adapt.c ----------------------------------------------------------------------------- */

bool adapt_open(struct adapt *adapt, uint64_t blocks);
unsigned age_bin(uint32_t age_s);

/* A prompt is asked for: remember its blocks. `use`: it is a turn of its own, not the second half
 * of one whose use was counted before. */
void adapt_request(struct adapt *adapt, const unsigned char *keys, size_t blocks, bool use,
                   uint32_t now_s);
unsigned adapt_class(const struct adapt *adapt, struct key key);

/* Count the memories that have not ended, by class and age. */
void adapt_living(const struct adapt *adapt, uint32_t now_s, struct ages *living);

/* -- index_policy.c: which READY place goes next ----------------------------------------------- */

void policy_open(struct policy *policy, enum policy_kind kind, uint32_t parameter,
                 uint32_t capacity);
void policy_insert(struct tier *tier, ref place, uint32_t clock_s);
void policy_use(struct tier *tier, ref place, uint32_t clock_s);

/* LIFETIME: tell a place's class, before it is inserted or used. */
void policy_classify(struct tier *tier, ref place, unsigned class);

/* LIFETIME: whether the next victim has outlived what it was worth. */
bool policy_expired(struct tier *tier, uint32_t clock_s);
void policy_remove(struct tier *tier, ref place);

/* Put a place back where the next victim is taken from. */
void policy_return(struct tier *tier, ref place);

/* Put a place back that was pinned when its turn came. */
void policy_unpark(struct tier *tier, ref place, uint32_t clock_s);

/* The next victim, or NONE. */
ref policy_victim(struct tier *tier, uint32_t clock_s);
const char *policy_check(const struct tier *tier);

/* -- index_places.c ---------------------------------------------------------------------------- */

ref place_take(struct tier *tier);
void place_free(struct tier *tier, ref place);
bool ready_elsewhere(const struct block_index *index, const struct node *node, unsigned tier);
bool has_place(const struct block_index *index, const struct node *node);

/* Let the block's places that were found unfit to go be candidates again. */
void unpark(struct block_index *index, const struct node *node);

/* The node may have lost its last child: a root goes then, a block may be evicted. */
void parent_lost_child(struct block_index *index, ref parent);

/* -- index_evict.c ----------------------------------------------------------------------------- */

/* Evict `wanted` blocks; when there are not even `needed`, none. Gives how many. */
size_t index_evict(struct block_index *index, unsigned tier, size_t needed, size_t wanted);

/* Change how many places a tier may use, up to those it was opened with; gives what it is now:
 * more than asked for when too many are held. */
uint32_t index_resize(struct block_index *index, unsigned tier, uint32_t capacity);

/* -- index_tiers.c: states of places ----------------------------------------------------------- */

/* How much of a batch is reserved when there is too little room, or the blocks are worth little. */
enum reserve_how {
    RESERVE_PREFIX,  /* as many as there is room for */
    RESERVE_ALL,     /* all, or none */
    RESERVE_WORTHY,  /* as many as there is room for, or are worth an eviction */
    RESERVE_HOWS,
};

/* Take places for n positions of keys (the root first), which become RESERVED; evict for them.
 * Gives how many were taken. -1 with `broken`. */
int64_t index_reserve(struct block_index *index, unsigned tier, const unsigned char *keys,
                      const int64_t *positions, size_t n, enum reserve_how how, int64_t *ids);

/* Each gives false with `broken` when an id is not in the state it must be in; those before it
 * have been done then. */
bool index_commit(struct block_index *index, unsigned tier, const int64_t *ids, size_t n);
bool index_abort(struct block_index *index, unsigned tier, const int64_t *ids, size_t n);
bool index_lease(struct block_index *index, unsigned tier, const int64_t *ids, size_t n,
                 int64_t token);
bool index_pin(struct block_index *index, unsigned tier, const int64_t *ids, size_t n);
bool index_unpin(struct block_index *index, unsigned tier, const int64_t *ids, size_t n);
bool index_forget(struct block_index *index, unsigned tier, const int64_t *ids, size_t n);
int64_t place_filler(const struct place *place);

/* Count a use of every READY place of nodes that are given from the root on. */
void index_use(struct block_index *index, const ref *nodes, size_t n);
void index_clear(struct block_index *index, unsigned tier);
void index_clear_root(struct block_index *index, ref root);
const char *index_check(struct block_index *index);

#endif
