/* The block index without Python: nodes, places, policies. See README.md, "Index".
 *
 * A node is a block's identity: its key, its parent, its children. A place is room for one block in
 * one tier. Both are named by number; NONE stands for no node or place. The blocks of KV group 0
 * are the chain; a block of another group is a leaf, a child of the chain's block at its position.
 */
#ifndef FLEXKV_INDEX_CORE_H
#define FLEXKV_INDEX_CORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "needs.h"

#define TIERS_MAX 4
#define GROUPS_MAX 32
#define QUOTAS_MAX 64
#define LISTS_MAX 64 /* of a policy that keeps its occupied lists in one word */
#define NONE UINT32_MAX
#define INDEX_KEY_BYTES ((size_t)16)

typedef uint32_t ref;

enum place_state { PLACE_FREE, PLACE_RESERVED, PLACE_READY, PLACE_DRAINING };

/* `list` of a READY place that is in no list: it could not be evicted when its turn came. */
#define LIST_PARKED 0xfffe
/* `list` of a place that is not READY. */
#define LIST_NONE 0xffff

struct key {
    uint32_t word[4];
};

/* 48 bytes, a reference for each tier, and where the model has leaves one word more: see node_word.
 * A root has no block: it stands for a namespace. */
struct node {
    struct key key;
    uint32_t bucket;    /* where its chain begins */
    ref chain;          /* the next in the same bucket, or in the list of free nodes */
    ref parent;         /* NONE for a root; NODE_FREE when the node is free */
    ref child;          /* the first child */
    ref before, after;  /* siblings */
    ref root;           /* the namespace; its own number for a root */
    uint32_t depth;     /* of a root 0, of the first block of a prompt 1 */
    ref place[];        /* by tier; for a root, how many blocks of it the tier has */
};

#define NODE_FREE (UINT32_MAX - 1)

struct place {
    ref node;           /* NONE: no key leads to the place */
    ref older, newer;   /* in the policy's list while READY; the filler's op id while RESERVED */
    uint32_t pins;
    uint16_t list;
    uint8_t state;
    uint8_t uses;
    uint16_t epoch;     /* of the last use; under FIFO and FILO of the arrival */
    uint8_t class : 7;  /* LHD */
    uint8_t spent : 1;  /* evicted next, unless it is asked for before; see policy_spend */
    uint8_t quota;      /* of its namespace, 0 for none: in whose lists the place is */
};

struct list {
    ref oldest, newest;
    uint32_t count;
};

/* The numbers are repeated in flexkv/index/eviction.py: append only. */
enum policy_kind { POLICY_LRU, POLICY_FIFO, POLICY_MRU, POLICY_FILO, POLICY_LFU, POLICY_SLRU,
                   POLICY_REWARD, POLICY_LHD, POLICY_KINDS };

struct density; /* what LHD has learned: index_density.h */

struct policy {
    enum policy_kind kind;
    uint32_t parameter;          /* SLRU: uses that protect; REWARD: seconds a use is worth */
    uint32_t protected_max;      /* SLRU */
    uint64_t first_bucket;       /* REWARD: the bucket of time in which the clock is */
    uint64_t occupied;           /* which lists have members, by bit; unused under LHD */
    unsigned cursor;             /* LHD: no cell before it, in the density's order, has members */
    struct list *lists;
    unsigned list_count;
};

struct tier {
    struct place *places;
    size_t places_bytes;
    uint32_t places_max, capacity;
    uint32_t unused;             /* places from here on were never taken */
    ref free_places;             /* a stack, linked by `older` */
    uint32_t free, reserved, ready, draining, pinned;
    uint32_t evict_blocks;       /* least number of blocks of an eviction */
    uint64_t evicted;
    uint64_t touched;            /* insertions and uses; not under LHD */
    unsigned epoch_shift;        /* an epoch is 1 << epoch_shift of them */
    struct density *density;     /* LHD */
    struct policy policies[QUOTAS_MAX + 1]; /* by quota */
    unsigned policy_count;
    uint32_t quota_blocks[QUOTAS_MAX + 1];
    uint32_t ready_of[GROUPS_MAX]; /* `ready` by KV group, if there are leaves */
};

/* A block that became READY in a tier, or is no longer READY there. */
struct change {
    struct key key;
    uint8_t tier, is_ready, group;
    uint8_t ready;               /* a bit for each tier that has it READY after the change */
    uint32_t depth;              /* how many blocks of the chain it ends; a leaf ends as many as its
                                    parent */
};

struct changes {
    struct change *kept;
    uint32_t count, limit;
    bool lost;                   /* there were more than `limit` since they were last taken */
};

/* What a prefix needs of a KV group of leaves: see needs.h. */
struct rule {
    enum group_kind kind;
    int64_t window, block_tokens;
    uint32_t ratio;              /* how many blocks of the chain one of its blocks covers */
    struct key salt;             /* a leaf's key is its parent's, XOR this */
    uint32_t bucket;             /* a leaf's bucket is its parent's, XOR this */
};

struct block_index {
    unsigned tiers;
    unsigned groups;             /* the chain's included; 1 if there are no leaves */
    size_t node_bytes;
    char *nodes;
    size_t nodes_bytes;
    uint32_t nodes_unused;
    ref free_nodes;
    ref *buckets;
    size_t buckets_bytes;
    uint32_t page_mask;
    uint32_t clock_s;
    unsigned quotas;             /* highest quota number so far; see quota_taken */
    bool quota_taken[QUOTAS_MAX + 1];
    struct key quota_root[QUOTAS_MAX + 1];
    struct tier tier[TIERS_MAX];
    struct changes changes;
    const char *broken;          /* the law that a failed call broke */
    size_t alignment;            /* prefixes end on multiples of it: no group's block is cut */
    struct rule rule[GROUPS_MAX]; /* by group; the first is not used */
};

static inline struct node *node_at(const struct block_index *index, ref node)
{
    return (struct node *)(index->nodes + (size_t)node * index->node_bytes);
}

/* Return a node's last word: for a leaf its group, LEAF, and SPENT if it is; for any other node a
 * bit for each group of which it has a leaf, in whatever state. Models without leaves lack it. */
static inline uint32_t *node_word(const struct block_index *index, ref node)
{
    return &node_at(index, node)->place[index->tiers];
}

#define LEAF UINT32_C(1) /* group 0 has no leaves, so its bit is free */
#define SPENT (UINT32_C(2) * GROUPS_MAX)

static inline bool is_leaf(const struct block_index *index, ref node)
{
    return index->groups > 1 && *node_word(index, node) & LEAF;
}

static inline unsigned group_of(const struct block_index *index, ref node)
{
    return is_leaf(index, node) ? *node_word(index, node) / 2 % GROUPS_MAX : 0;
}

/* -- index_table.c: memory, keys, families ----------------------------------------------------- */

/* Allocate the memory for a model with `groups` KV groups. Return false with errno set if that
 * fails. */
bool index_open(struct block_index *index, unsigned tiers, const uint32_t *capacities,
                unsigned groups);
void index_close(struct block_index *index);
/* The keys of one request: a root, then those of its blocks. Position p is the p-th block. */
static inline struct key key_at(const unsigned char *keys, int64_t position)
{
    struct key key;

    memcpy(&key, keys + (position + 1) * (int64_t)INDEX_KEY_BYTES, sizeof(key));
    return key;
}

/* Return the bucket of a block. The buckets of PAGE consecutive blocks of a prompt are in one cache
 * line, which the key of the first of them chooses; so neighbours share the cache miss. */
uint32_t bucket_at(const struct block_index *index, const unsigned char *keys, int64_t position);
uint32_t bucket_in_page(const struct block_index *index, struct key first, uint32_t position);
uint32_t bucket_of_root(const struct block_index *index, struct key key);
#define PAGE 16

/* Prefetch the memory in which the block at a position will be looked up. */
void bucket_expect(const struct block_index *index, const unsigned char *keys, int64_t position);
#define EXPECT_AHEAD 32

bool node_has(const struct block_index *index, ref number, struct key key);

ref node_find(const struct block_index *index, struct key key, uint32_t bucket);

/* Return the node of the chain's block at a position, or NONE; `guess` may be any number. */
ref node_seek(const struct block_index *index, const unsigned char *keys, int64_t position,
              ref guess);

/* Return the root of a namespace, or NONE if it has no blocks. */
ref root_find(const struct block_index *index, struct key key);

/* Find the nodes of the blocks from begin to end, up to the first that is nowhere: all after it are
 * nowhere, too. Return how many there are. */
size_t nodes_find(const struct block_index *index, const unsigned char *keys, size_t begin,
                  size_t end, ref *nodes);

/* Return how many blocks, from the first on, form a chain: a block that is named twice, or known
 * under another parent, ends it. Keys that were derived from tokens always do; keys from another
 * process must be checked by this before index_reserve gets them. -1 without memory. */
int64_t chain_agrees(const struct block_index *index, const unsigned char *keys, size_t blocks);

/* Add a root (without a parent) or a block of the chain. */
ref node_add(struct block_index *index, struct key key, uint32_t bucket, ref parent);
ref node_add_leaf(struct block_index *index, struct key key, uint32_t bucket, ref parent,
                  unsigned group);

/* Unlink a node that has a parent from its family, and link it again: an eviction does and undoes
 * this. */
static inline void node_leave(struct block_index *index, ref number)
{
    struct node *node = node_at(index, number), *parent = node_at(index, node->parent);

    if (node->before == NONE)
        parent->child = node->after;
    else
        node_at(index, node->before)->after = node->after;
    if (node->after != NONE)
        node_at(index, node->after)->before = node->before;
    if (is_leaf(index, number))
        *node_word(index, node->parent) &= ~(UINT32_C(1) << group_of(index, number));
}

void node_join(struct block_index *index, ref node);

/* Free a node that has left its family. */
void node_free(struct block_index *index, ref node);

/* -- index_leaves.c ---------------------------------------------------------------------------- */

/* Set a group's rule; the index must be open. */
void rule_set(struct block_index *index, unsigned group, struct rule rule);

struct key leaf_key(const struct block_index *index, struct key parent, unsigned group);

/* Return the leaf of a chain's block in a group, or NONE; `guess` may be any number. */
ref leaf_find(const struct block_index *index, ref parent, unsigned group, ref guess);

/* Do the same as leaf_find, but add the leaf if there is none. */
ref leaf_take(struct block_index *index, ref parent, unsigned group, ref guess);

static inline bool is_spent(const struct block_index *index, ref node)
{
    return is_leaf(index, node) && *node_word(index, node) & SPENT;
}

/* After a leaf became READY, mark as spent the leaves of its group that the prefix up to it does
 * not need, as far up as no other prompt branches off. They are evicted next. */
void leaves_spend(struct block_index *index, ref leaf);

/* How far the blocks of one request can be loaded, and which leaves that needs. */
struct reach {
    const ref *chain;            /* the nodes of the chain, by position, up to `ready` */
    size_t first;                /* leaves before this position are not needed */
    size_t ready;                /* where the chain from `first` on stops being loadable */
    size_t end;                  /* the result: where the prefix ends, at least `first` */
    unsigned unusable;           /* a bit for each tier that must not be used */
    bool waits;                  /* whether blocks that ops bring to the first tier count, */
    const int64_t *shunned;      /* except those that these ops bring */
    size_t shunned_count;
    const uint8_t *device;       /* by group and position: whether the device has a block for the
                                    leaf; NULL if none is needed */
    size_t device_blocks;        /* positions of each group in `device`; behind them it has none */
    struct {
        ref *nodes;              /* leaves by the group's own blocks; memory for `ready` / ratio */
        size_t needed;           /* the first of its own blocks that the prefix needs */
        size_t from;             /* the first of them that is needed and not before `first` */
        size_t low;              /* while searching: those from here on are in `nodes` */
    } leaves[GROUPS_MAX];
};

/* Return whether an op that may be waited for is bringing a block to the first tier. */
bool reach_awaits(const struct block_index *index, const struct reach *reach, ref number);

/* Find the longest prefix for which all needed blocks of every group can be loaded, and `drop` more
 * blocks of the chain as well. */
void reach_find(const struct block_index *index, struct reach *reach, size_t drop);

/* Return the leaf at a position that the prefix needs, or NONE. It may be before `first`. */
ref reach_leaf(const struct block_index *index, const struct reach *reach, unsigned group,
               size_t position);

/* Write the first `n` nodes of the chain, each followed by those of its leaves that the prefix
 * needs. Return how many there are, at most as many as in the chain and in all groups. */
size_t reach_nodes(const struct block_index *index, const struct reach *reach, size_t n,
                   ref *nodes);

/* -- index_changes.c --------------------------------------------------------------------------- */

bool changes_watch(struct changes *changes, uint32_t limit);
void changes_close(struct changes *changes);
void changes_note(struct block_index *index, ref node, unsigned tier, bool is_ready);

/* Write a change for each READY block that ends a span of `size` blocks, and for each READY leaf,
 * among the nodes from `begin` up to `end`: as if it had just become READY in its nearest tier.
 * Return how many there are. */
size_t ready_ends(const struct block_index *index, ref begin, ref end, uint32_t size,
                  struct change *changes);

/* Blocks of one request, by position, in ascending order. */
struct batch {
    const unsigned char *keys;   /* the root first */
    size_t blocks;               /* of the whole request */
    const int64_t *positions;
    size_t n;
    unsigned group;
};

/* Return whether a block of the batch is the last of its request. */
static inline bool is_last(const struct batch *batch, size_t i)
{
    return batch->positions[i] + 1 == (int64_t)batch->blocks;
}

/* -- index_policy.c: which READY place goes next ----------------------------------------------- */

bool policy_open(struct policy *policy, enum policy_kind kind, uint32_t parameter,
                 uint32_t capacity);
void policy_close(struct policy *policy);
bool tier_policy_open(struct tier *tier, enum policy_kind kind, uint32_t parameter);
void policy_insert(struct tier *tier, ref place, uint32_t clock_s);
void policy_use(struct tier *tier, ref place, uint32_t clock_s);

void policy_remove(struct tier *tier, ref place);

/* Put a place back at the end of the list from which the next victim is taken. */
void policy_return(struct tier *tier, ref place);

/* Make a place the next victim, as if it was never used; under LFU only the next of its list. It is
 * spent from now on: if it is pinned when its turn comes, it is the next victim again after that. A
 * use ends this. */
void policy_spend(struct tier *tier, ref place);

/* Append all of one list to another. */
void policy_splice(struct tier *tier, struct policy *policy, unsigned from, unsigned to);

/* Move a place to another quota's lists, as the newest of the same list. */
void policy_move(struct tier *tier, ref place, uint8_t quota);

/* Put a place back that was pinned when its turn came. */
void policy_unpark(struct tier *tier, ref place, uint32_t clock_s);

/* Return the next victim, of all places or of one quota's, or NONE. */
ref policy_victim(struct tier *tier, uint32_t clock_s);
ref policy_victim_of(struct tier *tier, unsigned quota, uint32_t clock_s);
const char *policy_check(const struct tier *tier);

/* -- index_places.c ---------------------------------------------------------------------------- */

/* Take a free place for a block; under LHD of a class that `uses` and `last` determine. */
ref place_reserve(struct block_index *index, unsigned t, ref number, unsigned quota, uint32_t uses,
                  bool last);

/* Return a place by its id; NULL if the tier has never had it in use. */
static inline struct place *place_at(const struct tier *tier, int64_t id)
{
    return id < 0 || id >= tier->unused ? NULL : &tier->places[id];
}

void place_free(struct tier *tier, ref place);
bool ready_elsewhere(const struct block_index *index, const struct node *node, unsigned tier);
bool has_place(const struct block_index *index, const struct node *node);

/* Return a bit for each tier that has a block READY. */
unsigned ready_tiers(const struct block_index *index, const struct node *node);

/* Return whether a block is ready in the first tier, or is not there and ready in another. A tier
 * whose bit is set in `unusable` does not count. */
bool is_loadable(const struct block_index *index, ref number, unsigned unusable);

/* Count a place that became READY (1) or is no longer (-1). */
static inline void ready_count(const struct block_index *index, struct tier *tier, ref node,
                               int by)
{
    tier->ready += (uint32_t)by;
    if (index->groups > 1)
        tier->ready_of[group_of(index, node)] += (uint32_t)by;
}

/* Make the block's parked places candidates for eviction again. */
void unpark(struct block_index *index, const struct node *node);

/* Handle that a node may have lost its last child: free a root, unpark a block. */
void parent_lost_child(struct block_index *index, ref parent);

/* -- index_evict.c ----------------------------------------------------------------------------- */

#define ANY_QUOTA UINT32_MAX

/* Evict up to `wanted` blocks, of one quota or of any, but none if fewer than `needed` can go.
 * Return how many were evicted. */
size_t index_evict(struct block_index *index, unsigned tier, unsigned quota, size_t needed,
                   size_t wanted);

/* Do the same, but evict `own` of them first from one quota: all `needed` blocks, or none. */
size_t index_evict_all(struct block_index *index, unsigned tier, unsigned quota, size_t own,
                       size_t needed, size_t wanted);

/* Change how many places a tier may use, up to those it was opened with. Return the new number,
 * which is more than asked for if too many are pinned or being filled. */
uint32_t index_resize(struct block_index *index, unsigned tier, uint32_t capacity);

/* -- index_quota.c ----------------------------------------------------------------------------- */

/* Return the number of a namespace's quota, or 0 if it has none. */
unsigned quota_of(const struct block_index *index, struct key root);

#define NO_QUOTA UINT32_MAX

/* Set how many places of a tier a namespace may have, and evict blocks beyond that. A namespace
 * that has NO_QUOTA in every tier is like the others again. Return 0, -1 if there are too many
 * quotas, or -2 without memory. */
int quota_set(struct block_index *index, unsigned tier, struct key root, uint32_t blocks);
uint32_t quota_used(const struct block_index *index, unsigned tier, struct key root);

/* Return how many places a quota has left; negative while blocks beyond it cannot be evicted. */
int64_t quota_left(const struct block_index *index, unsigned tier, unsigned quota);

/* -- index_reserve.c --------------------------------------------------------------------------- */

/* How much of a batch to reserve if there is too little room, or if its blocks are worth little. */
enum reserve_how {
    RESERVE_PREFIX,  /* as many as there is room for */
    RESERVE_ALL,     /* all, or none */
    RESERVE_WORTHY,  /* as many as there is room for, or are worth an eviction */
    RESERVE_HOWS,
};

/* Make room for a batch as far as that can and should be done. Return for how many blocks there is
 * room. Under LHD, `uses` has the uses of each block. */
size_t room_make(struct block_index *index, unsigned tier, unsigned quota,
                 const struct batch *batch, enum reserve_how how, const int64_t *uses);

/* Take places for a batch, which become RESERVED; evict for them.
 * Return how many were taken, or -1 with `broken` set. */
int64_t index_reserve(struct block_index *index, unsigned tier, const struct batch *batch,
                      enum reserve_how how, int64_t *ids);

/* -- index_tiers.c: states of places ----------------------------------------------------------- */

/* Each returns false, with `broken` set, if a place is in a wrong state; the places before that one
 * have been processed then. */
bool index_commit(struct block_index *index, unsigned tier, const int64_t *ids, size_t n);
bool index_abort(struct block_index *index, unsigned tier, const int64_t *ids, size_t n);
bool index_lease(struct block_index *index, unsigned tier, const int64_t *ids, size_t n,
                 int64_t op_id);
bool index_pin(struct block_index *index, unsigned tier, const int64_t *ids, size_t n);
bool index_unpin(struct block_index *index, unsigned tier, const int64_t *ids, size_t n);
bool index_forget(struct block_index *index, unsigned tier, const int64_t *ids, size_t n);
int64_t place_filler(const struct place *place);

/* Make those places the next to be evicted that still hold the blocks with these keys, READY.
 * Return how many there are. */
size_t index_spend(struct block_index *index, unsigned tier, const int64_t *ids,
                   const unsigned char *keys, size_t n);

/* Count a use of every READY place of these nodes, which are given from the root on, a block's
 * leaves behind it; of spent places only if they are `asked` for, not stored again. Does nothing
 * under LHD. */
void index_use(struct block_index *index, const ref *nodes, size_t n, bool asked);
void index_clear(struct block_index *index, unsigned tier);
void index_clear_root(struct block_index *index, ref root);
const char *index_check(struct block_index *index);

#endif
