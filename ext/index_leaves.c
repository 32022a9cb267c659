/* Leaves: the blocks of all KV groups but the chain's, and how far they reach.
 *
 * A leaf is known by its parent and its group. Its bucket is its parent's, moved by a distance that
 * belongs to the group, so leaves at neighbouring positions share a cache line as the chain's
 * blocks do. Leaves that came together have neighbouring nodes, as the chain's blocks do, too.
 */
#include "index_core.h"

void rule_set(struct block_index *index, unsigned group, struct rule rule)
{
    rule.bucket = bucket_of_root(index, rule.salt);
    index->rule[group] = rule;
}

static uint32_t leaf_bucket(const struct block_index *index, ref parent, unsigned group)
{
    return node_at(index, parent)->bucket ^ index->rule[group].bucket;
}

struct key leaf_key(const struct block_index *index, struct key parent, unsigned group)
{
    for (unsigned i = 0; i < sizeof(parent.word) / sizeof(*parent.word); i++)
        parent.word[i] ^= index->rule[group].salt.word[i];
    return parent;
}

static bool leaf_is(const struct block_index *index, ref number, ref parent, unsigned group)
{
    return node_at(index, number)->parent == parent &&
           (*node_word(index, number) & ~SPENT) == (group << 1 | LEAF);
}

ref leaf_find(const struct block_index *index, ref parent, unsigned group, ref guess)
{
    ref at;

    if (!(*node_word(index, parent) >> group & 1))
        return NONE;
    if (guess < index->nodes_unused && leaf_is(index, guess, parent, group))
        return guess;
    at = index->buckets[leaf_bucket(index, parent, group)] - 1;
    while (!leaf_is(index, at, parent, group))
        at = node_at(index, at)->chain;
    return at;
}

ref leaf_take(struct block_index *index, ref parent, unsigned group, ref guess)
{
    ref found = leaf_find(index, parent, group, guess);

    if (found != NONE)
        return found;
    return node_add_leaf(index, leaf_key(index, node_at(index, parent)->key, group),
                         leaf_bucket(index, parent, group), parent, group);
}

/* -- leaves that nobody is likely to need ------------------------------------------------------ */

/* How far up spent leaves are looked for, so that no commit takes long. */
#define TURN_BLOCKS_MAX 4096

/* Return how many of a group's own blocks a prefix needs at most; 0 if that grows with it. */
static int64_t most_needed(const struct rule *rule)
{
    switch (rule->kind) {
    case GROUP_WINDOW:
        return (rule->window - 2 + rule->block_tokens) / rule->block_tokens;
    case GROUP_CHUNK:
        return (rule->window - 1 + rule->block_tokens) / rule->block_tokens;
    case GROUP_STATE:
        return 1;
    default:
        return 0;
    }
}

/* Return whether a block of the chain is the only one that continues its parent, which may have
 * leaves before and behind it. */
static bool is_only_child(const struct block_index *index, ref number)
{
    ref before = node_at(index, number)->before, after = node_at(index, number)->after;

    while (before != NONE && is_leaf(index, before))
        before = node_at(index, before)->before;
    while (after != NONE && is_leaf(index, after))
        after = node_at(index, after)->after;
    return before == NONE && after == NONE;
}

void leaves_spend(struct block_index *index, ref last)
{
    unsigned group = group_of(index, last);
    const struct rule *rule = &index->rule[group];
    int64_t needed = most_needed(rule) * rule->ratio;
    ref at = node_at(index, last)->parent, leaf = last;

    if (!needed)
        return;
    for (int64_t apart = 1; apart - needed < TURN_BLOCKS_MAX; apart++) {
        if (!is_only_child(index, at))
            return;
        at = node_at(index, at)->parent;
        if (node_at(index, at)->parent == NONE)
            return;
        leaf = apart < needed ? NONE : leaf_find(index, at, group, leaf - 1);
        if (leaf == NONE)
            continue;
        if (is_spent(index, leaf))
            return;
        *node_word(index, leaf) |= SPENT;
        for (unsigned t = 0; t < index->tiers; t++)
            if (node_at(index, leaf)->place[t] != NONE)
                policy_spend(&index->tier[t], node_at(index, leaf)->place[t]);
    }
}

/* -- how far a prefix reaches ------------------------------------------------------------------ */

static size_t align(const struct block_index *index, size_t blocks)
{
    return blocks - blocks % index->alignment;
}

bool reach_awaits(const struct block_index *index, const struct reach *reach, ref number)
{
    ref id = node_at(index, number)->place[0];
    const struct place *place;

    if (!reach->waits || id == NONE || reach->unusable & 1)
        return false;
    place = &index->tier[0].places[id];
    if (place->state != PLACE_RESERVED)
        return false;
    for (size_t i = 0; i < reach->shunned_count; i++)
        if (place_filler(place) == reach->shunned[i])
            return false;
    return true;
}

/* Return the leaf at a position, or NONE if it cannot be loaded. */
static ref leaf_to_load(const struct block_index *index, const struct reach *reach, unsigned group,
                        size_t position, ref guess)
{
    ref leaf;

    if (reach->device && (position >= reach->device_blocks ||
                          !reach->device[(group - 1) * reach->device_blocks + position]))
        return NONE;
    leaf = leaf_find(index, reach->chain[position], group, guess);
    if (leaf == NONE || is_loadable(index, leaf, reach->unusable))
        return leaf;
    return reach_awaits(index, reach, leaf) ? leaf : NONE;
}

/* Return the end of the longest prefix of at most `end` blocks of which all leaves of a group can
 * be loaded. They are looked at from the last one backwards; if one is missing, the next prefix is
 * the longest that may not need it.
 *
 * A shorter prefix never begins to need leaves later than a longer one (see needs.h). So each leaf
 * is looked at once, whatever the number of prefixes that are tried. */
static size_t group_reach(const struct block_index *index, struct reach *reach, unsigned group,
                          size_t end)
{
    const struct rule *rule = &index->rule[group];
    size_t before_first = reach->first / rule->ratio, low = reach->leaves[group].low;
    ref *nodes = reach->leaves[group].nodes, last = NONE;

    while (end > reach->first) {
        size_t count = end / rule->ratio;
        size_t needed = (size_t)group_needed_from(rule->kind, rule->window, rule->block_tokens,
                                                  (int64_t)count * rule->block_tokens);
        size_t from = needed > before_first ? needed : before_first;

        for (low = low < count ? low : count; low > from; nodes[--low] = last) {
            last = leaf_to_load(index, reach, group, low * rule->ratio - 1, last - 1);
            if (last == NONE)
                break;
        }
        if (low <= from) {
            reach->leaves[group].needed = needed;
            reach->leaves[group].from = from;
            break;
        }
        end = align(index, --low * rule->ratio);
    }
    reach->leaves[group].low = low;
    return end;
}

void reach_find(const struct block_index *index, struct reach *reach, size_t drop)
{
    size_t end = reach->ready > drop ? align(index, reach->ready - drop) : 0, tried;

    for (unsigned group = 1; group < index->groups; group++)
        reach->leaves[group].low = SIZE_MAX;
    do {
        tried = end;
        for (unsigned group = 1; group < index->groups && end > reach->first; group++)
            end = group_reach(index, reach, group, end);
    } while (end < tried && end > reach->first);
    reach->end = end > reach->first ? end : reach->first;
    for (unsigned group = 1; group < index->groups && end <= reach->first; group++)
        reach->leaves[group].needed = reach->leaves[group].from = SIZE_MAX;
}

ref reach_leaf(const struct block_index *index, const struct reach *reach, unsigned group,
               size_t position)
{
    size_t ratio = index->rule[group].ratio, number = position / ratio;

    if (number < reach->leaves[group].needed || position >= reach->end ||
        (position + 1) % ratio != 0)
        return NONE;
    return number < reach->leaves[group].from
               ? leaf_find(index, reach->chain[position], group, NONE)
               : reach->leaves[group].nodes[number];
}

size_t reach_nodes(const struct block_index *index, const struct reach *reach, size_t n,
                   ref *nodes)
{
    size_t count = 0;

    for (size_t position = 0; position < n; position++) {
        nodes[count++] = reach->chain[position];
        for (unsigned group = 1; group < index->groups; group++) {
            ref leaf = reach_leaf(index, reach, group, position);

            if (leaf != NONE)
                nodes[count++] = leaf;
        }
    }
    return count;
}
