/* Nodes: memory that is allocated as it is touched, a chained hash table, and families. */
#include "index_core.h"
#include "index_density.h"
#include "memory.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static bool tier_open(struct tier *tier, uint32_t capacity)
{
    tier->places_max = tier->capacity = tier->free = capacity;
    tier->free_places = NONE;
    tier->places_bytes = ((size_t)capacity + 1) * sizeof(struct place);
    tier->places = memory_map(tier->places_bytes);
    return tier->places;
}

bool index_open(struct block_index *index, unsigned tiers, const uint32_t *capacities,
                unsigned groups)
{
    uint64_t blocks = 0, buckets = 4 * PAGE;

    memset(index, 0, sizeof(*index));
    index->groups = groups;
    index->alignment = 1;
    for (unsigned t = 0; t < tiers; t++) {
        if (!tier_open(&index->tier[t], capacities[t]))
            return false;
        index->tiers = t + 1;
        blocks += capacities[t];
    }
    while (buckets < blocks + blocks / 2)
        buckets *= 2;
    /* Each node has a place or, as a root, a child. */
    if (2 * blocks >= NODE_FREE) {
        errno = EOVERFLOW;
        return false;
    }
    index->node_bytes = sizeof(struct node) + (tiers + (groups > 1)) * sizeof(ref);
    index->nodes_bytes = (2 * (size_t)blocks + 2) * index->node_bytes;
    index->buckets_bytes = (size_t)buckets * sizeof(ref);
    index->free_nodes = NONE;
    index->page_mask = (uint32_t)(buckets / PAGE - 1);
    index->nodes = memory_map(index->nodes_bytes);
    index->buckets = memory_map(index->buckets_bytes);
    return index->nodes && index->buckets;
}

void index_close(struct block_index *index)
{
    for (unsigned t = 0; t < TIERS_MAX; t++)
        if (index->tier[t].places)
            munmap(index->tier[t].places, index->tier[t].places_bytes);
    for (unsigned t = 0; t < TIERS_MAX; t++) {
        for (unsigned quota = 0; quota < index->tier[t].policy_count; quota++)
            policy_close(&index->tier[t].policies[quota]);
        density_free(index->tier[t].density);
    }
    if (index->nodes)
        munmap(index->nodes, index->nodes_bytes);
    if (index->buckets)
        munmap(index->buckets, index->buckets_bytes);
    changes_close(&index->changes);
    memset(index, 0, sizeof(*index));
}

uint32_t bucket_in_page(const struct block_index *index, struct key first, uint32_t position)
{
    /* Short prompts leave the end of their page empty, so pages begin anywhere in the line. */
    return (first.word[0] & index->page_mask) * PAGE + ((first.word[1] + position) & (PAGE - 1));
}

uint32_t bucket_at(const struct block_index *index, const unsigned char *keys, int64_t position)
{
    return bucket_in_page(index, key_at(keys, position - position % PAGE), (uint32_t)position);
}

uint32_t bucket_of_root(const struct block_index *index, struct key key)
{
    return (key.word[0] & index->page_mask) * PAGE;
}

void bucket_expect(const struct block_index *index, const unsigned char *keys, int64_t position)
{
    if (position % PAGE == 0)
        __builtin_prefetch(&index->buckets[bucket_at(index, keys, position)], 1);
}

static bool key_is(const struct node *node, struct key key)
{
    return memcmp(&node->key, &key, sizeof(key)) == 0;
}

bool node_has(const struct block_index *index, ref number, struct key key)
{
    const struct node *node;

    if (number >= index->nodes_unused)
        return false;
    node = node_at(index, number);
    return key_is(node, key) && node->parent != NODE_FREE;
}

#define ALWAYS_INLINE inline __attribute__((always_inline))

/* Guess the node of a key; return NONE if the guesses are wrong. Blocks that came together have
 * neighbouring nodes, so the number after `before`, the node of the block before, is the first
 * guess; the first child of `before` is the second. `leaves` says whether there may be any. */
static ALWAYS_INLINE ref node_guess(const struct block_index *index, struct key key, ref before,
                                    bool leaves)
{
    ref child;

    if (before == NONE)
        return NONE;
    if (node_has(index, before + 1, key) && node_at(index, before + 1)->parent == before &&
        !(leaves && is_leaf(index, before + 1)))
        return before + 1;
    child = node_at(index, before)->child;
    return node_has(index, child, key) && !(leaves && is_leaf(index, child)) ? child : NONE;
}

/* A bucket holds a node's number plus one, so that untouched memory is empty buckets. Leaves are
 * passed over: a key that another process made up may be that of one. */
ref node_find(const struct block_index *index, struct key key, uint32_t bucket)
{
    ref at = index->buckets[bucket] - 1;

    while (at != NONE && (!key_is(node_at(index, at), key) || is_leaf(index, at)))
        at = node_at(index, at)->chain;
    return at;
}

ref node_seek(const struct block_index *index, const unsigned char *keys, int64_t position,
              ref guess)
{
    struct key key = key_at(keys, position);
    uint32_t bucket = bucket_at(index, keys, position);

    if (node_has(index, guess, key) && node_at(index, guess)->bucket == bucket &&
        !is_leaf(index, guess))
        return guess;
    return node_find(index, key, bucket);
}

ref root_find(const struct block_index *index, struct key key)
{
    ref root = node_find(index, key, bucket_of_root(index, key));

    return root != NONE && node_at(index, root)->parent == NONE ? root : NONE;
}

/* Prefetch what looking up the blocks after this one will need. */
static void nodes_expect(const struct block_index *index, const unsigned char *keys, size_t i,
                         size_t end)
{
    size_t soon = i + EXPECT_AHEAD, sooner = i + EXPECT_AHEAD / 4;

    if (soon < end)
        bucket_expect(index, keys, (int64_t)soon);
    if (sooner < end) {
        ref near = index->buckets[bucket_at(index, keys, (int64_t)sooner)] - 1;

        if (near != NONE)
            __builtin_prefetch(node_at(index, near));
    }
}

/* Return the node of the i-th block, by a guess from the one before if there is one; or NONE. */
static ALWAYS_INLINE ref node_next(const struct block_index *index, const unsigned char *keys,
                                   size_t i, size_t end, ref before, bool leaves)
{
    struct key key = key_at(keys, (int64_t)i);
    ref found = node_guess(index, key, before, leaves);

    if (found != NONE)
        return found;
    nodes_expect(index, keys, i, end);
    return node_find(index, key, bucket_at(index, keys, (int64_t)i));
}

static ALWAYS_INLINE size_t chain_find(const struct block_index *index, const unsigned char *keys,
                                       const size_t range[2], ref *nodes, bool leaves)
{
    ref last = NONE;

    for (size_t i = range[0]; i < range[1]; i++) {
        last = node_next(index, keys, i, range[1], last, leaves);
        if (last == NONE)
            return i - range[0];
        nodes[i - range[0]] = last;
    }
    return range[1] - range[0];
}

/* Models without leaves have a loop of their own, which does not check for leaves. */
size_t nodes_find(const struct block_index *index, const unsigned char *keys, size_t begin,
                  size_t end, ref *nodes)
{
    const size_t range[] = {begin, end};

    return index->groups > 1 ? chain_find(index, keys, range, nodes, true)
                             : chain_find(index, keys, range, nodes, false);
}

/* A set of keys, by position: the table holds positions plus two, so that zero is empty and one is
 * the root. Its size is a power of two. */
struct seen {
    uint32_t *table;
    size_t slots;
    const unsigned char *keys;
};

/* Return the entry of the key at a position: where it is, or where it would be. */
static uint32_t *seen_at(const struct seen *seen, int64_t position)
{
    struct key key = key_at(seen->keys, position);
    size_t at;

    memcpy(&at, &key, sizeof(at));
    for (at &= seen->slots - 1; seen->table[at]; at = (at + 1) & (seen->slots - 1))
        if (memcmp(seen->keys + (seen->table[at] - 1) * (size_t)INDEX_KEY_BYTES, &key,
                   sizeof(key)) == 0)
            break;
    return &seen->table[at];
}

/* Return whether a key was seen before, and add it if not. */
static bool seen_before(const struct seen *seen, int64_t position)
{
    uint32_t *at = seen_at(seen, position);

    if (*at)
        return true;
    *at = (uint32_t)(position + 2);
    return false;
}

/* Return how many blocks precede the first, from `begin` on, that is known or named twice: after
 * its last known block a chain has no such block. -1 without memory. */
static int64_t unknown_agree(const struct block_index *index, const unsigned char *keys,
                             size_t begin, size_t end)
{
    struct seen seen = {.slots = 16, .keys = keys};
    size_t i;

    while (seen.slots < 2 * (end - begin + 1))
        seen.slots *= 2;
    seen.table = calloc(seen.slots, sizeof(*seen.table));
    if (!seen.table)
        return -1;
    seen_before(&seen, -1);
    for (i = begin; i < end; i++) {
        if (seen_before(&seen, (int64_t)i) || node_next(index, keys, i, end, NONE, true) != NONE)
            break;
    }
    for (size_t known = 0; known < begin; known++) {
        uint32_t twice = *seen_at(&seen, (int64_t)known);

        if (twice > 1 && twice - 2 < i)
            i = twice - 2;
    }
    free(seen.table);
    return (int64_t)i;
}

/* A node has one parent, so the known blocks of a chain are all different, and only the unknown
 * ones must be compared with each other. */
int64_t chain_agrees(const struct block_index *index, const unsigned char *keys, size_t blocks)
{
    struct key root = key_at(keys, -1);
    ref parent = node_find(index, root, bucket_of_root(index, root));
    size_t i = 0;

    if (parent != NONE && node_at(index, parent)->parent != NONE)
        return 0;
    for (; parent != NONE && i < blocks; i++) {
        struct key key = key_at(keys, (int64_t)i);
        ref found = node_next(index, keys, i, blocks, parent, true);

        if (found == NONE)
            break;
        if (node_at(index, found)->parent != parent || memcmp(&key, &root, sizeof(key)) == 0)
            return (int64_t)i;
        parent = found;
    }
    return i < blocks ? unknown_agree(index, keys, i, blocks) : (int64_t)i;
}

/* Link a node between a sibling, or NONE, and the one after it. */
static void node_join_behind(struct block_index *index, ref number, ref before)
{
    struct node *node = node_at(index, number);
    ref *link = before == NONE ? &node_at(index, node->parent)->child
                               : &node_at(index, before)->after;

    node->before = before;
    node->after = *link;
    if (node->after != NONE)
        node_at(index, node->after)->before = number;
    *link = number;
}

/* Leaves go behind the first child, which walks along the chain look at. */
static void leaf_join(struct block_index *index, ref number)
{
    ref parent = node_at(index, number)->parent;

    *node_word(index, parent) |= UINT32_C(1) << group_of(index, number);
    node_join_behind(index, number, node_at(index, parent)->child);
}

void node_join(struct block_index *index, ref number)
{
    if (is_leaf(index, number))
        leaf_join(index, number);
    else
        node_join_behind(index, number, NONE);
}

/* Take a number for a node that has no place, and put it into its bucket, but not yet among its
 * parent's children. */
static ALWAYS_INLINE ref node_new(struct block_index *index, struct key key, uint32_t bucket,
                                  ref parent)
{
    ref number = index->free_nodes;
    struct node *node;

    if (number == NONE)
        number = index->nodes_unused++;
    else
        index->free_nodes = node_at(index, number)->chain;
    node = node_at(index, number);
    node->key = key;
    node->bucket = bucket;
    node->chain = index->buckets[bucket] - 1;
    index->buckets[bucket] = number + 1;
    node->parent = parent;
    node->child = NONE;
    node->root = parent == NONE ? number : node_at(index, parent)->root;
    node->depth = parent == NONE ? 0 : node_at(index, parent)->depth + 1;
    for (unsigned t = 0; t < index->tiers; t++)
        node->place[t] = parent == NONE ? 0 : NONE;
    return number;
}

ref node_add(struct block_index *index, struct key key, uint32_t bucket, ref parent)
{
    ref number = node_new(index, key, bucket, parent);

    if (index->groups > 1)
        *node_word(index, number) = 0;
    if (parent == NONE)
        node_at(index, number)->before = node_at(index, number)->after = NONE;
    else
        node_join_behind(index, number, NONE);
    return number;
}

ref node_add_leaf(struct block_index *index, struct key key, uint32_t bucket, ref parent,
                  unsigned group)
{
    ref number = node_new(index, key, bucket, parent);

    *node_word(index, number) = group << 1 | LEAF;
    leaf_join(index, number);
    return number;
}

void node_free(struct block_index *index, ref number)
{
    struct node *node = node_at(index, number);
    ref *link = &index->buckets[node->bucket];

    if (*link - 1 == number) {
        *link = node->chain + 1;
    } else {
        ref at = *link - 1;

        while (node_at(index, at)->chain != number)
            at = node_at(index, at)->chain;
        node_at(index, at)->chain = node->chain;
    }
    node->parent = NODE_FREE;
    node->chain = index->free_nodes;
    index->free_nodes = number;
}
