/* Eviction order. A policy is a few lists, and rules about which list and which end.
 *
 *   LRU, MRU     list 0 by last use; the oldest, or the newest, goes
 *   FIFO, FILO   list 0 by arrival; the oldest, or the newest, goes
 *   LFU          list u: those used u times, by last use; the lowest list goes first
 *   SLRU         list 0 on probation, list 1 protected: used often enough, at most 4/5 of the tier
 *   LHD          a list for each class and epoch of last use; that whose places are worth least
 *                goes first (index_density.c)
 *   REWARD       a calendar: each use keeps a place for some seconds more. List 0 is overdue; the
 *                others are a ring of buckets of time, from `first_bucket` on
 */
#include "index_core.h"

#include <stdlib.h>

#define USES_MAX UINT8_MAX
#define RING (LISTS_MAX - 1)
#define BUCKETS_A_USE 4
#define REWARD_USES_MAX ((RING - 2) / BUCKETS_A_USE)

bool policy_open(struct policy *policy, enum policy_kind kind, uint32_t parameter,
                 uint32_t capacity)
{
    *policy = (struct policy){.kind = kind, .parameter = parameter,
                              .list_count = kind == POLICY_LHD ? CELLS : LISTS_MAX};
    policy->protected_max = (uint32_t)((uint64_t)capacity * 4 / 5);
    policy->lists = malloc(policy->list_count * sizeof(*policy->lists));
    if (kind == POLICY_LHD)
        policy->density = density_new(capacity);
    if (!policy->lists || (kind == POLICY_LHD && !policy->density))
        return false;
    for (unsigned i = 0; i < policy->list_count; i++)
        policy->lists[i] = (struct list){NONE, NONE, 0};
    return true;
}

void policy_close(struct policy *policy)
{
    free(policy->lists);
    density_free(policy->density);
}

/* A list has its first member, or lost its last. */
static void occupy(struct policy *policy, unsigned number, bool occupied)
{
    struct density *density = policy->density;

    if (!density) {
        policy->occupied = (policy->occupied & ~(UINT64_C(1) << number)) |
                           (uint64_t)occupied << number;
        return;
    }
    if (occupied && density->rank[number] < density->cursor)
        density->cursor = density->rank[number];
}

static void link_newest(struct tier *tier, unsigned number, ref place)
{
    struct list *list = &tier->policy.lists[number];
    struct place *at = &tier->places[place];

    at->list = (uint16_t)number;
    at->older = list->newest;
    at->newer = NONE;
    if (list->newest == NONE)
        list->oldest = place;
    else
        tier->places[list->newest].newer = place;
    list->newest = place;
    if (!list->count++)
        occupy(&tier->policy, number, true);
}

static void link_oldest(struct tier *tier, unsigned number, ref place)
{
    struct list *list = &tier->policy.lists[number];
    struct place *at = &tier->places[place];

    at->list = (uint16_t)number;
    at->older = NONE;
    at->newer = list->oldest;
    if (list->oldest == NONE)
        list->newest = place;
    else
        tier->places[list->oldest].older = place;
    list->oldest = place;
    if (!list->count++)
        occupy(&tier->policy, number, true);
}

void policy_remove(struct tier *tier, ref place)
{
    struct place *at = &tier->places[place];
    struct list *list;

    if (at->list >= LIST_PARKED) {
        at->list = LIST_NONE;
        return;
    }
    list = &tier->policy.lists[at->list];
    if (at->older == NONE)
        list->oldest = at->newer;
    else
        tier->places[at->older].newer = at->newer;
    if (at->newer == NONE)
        list->newest = at->older;
    else
        tier->places[at->newer].older = at->older;
    if (!--list->count)
        occupy(&tier->policy, at->list, false);
    at->list = LIST_NONE;
}

void policy_splice(struct tier *tier, unsigned from, unsigned to)
{
    while (tier->policy.lists[from].oldest != NONE) {
        ref place = tier->policy.lists[from].oldest;

        policy_remove(tier, place);
        link_newest(tier, to, place);
    }
}

/* -- the calendar of REWARD -------------------------------------------------------------------- */

static uint64_t bucket_of_second(const struct policy *policy, uint64_t second)
{
    return second * BUCKETS_A_USE / policy->parameter;
}

static unsigned list_of_bucket(uint64_t bucket)
{
    return 1 + (unsigned)(bucket % RING);
}

/* Let what is due by now join the overdue, in the order of their buckets. */
static void calendar_turn(struct tier *tier, uint32_t clock_s)
{
    struct policy *policy = &tier->policy;
    uint64_t now = bucket_of_second(policy, clock_s), bucket = policy->first_bucket;

    for (unsigned turns = 0; bucket < now && turns < RING; bucket++, turns++)
        policy_splice(tier, list_of_bucket(bucket), 0);
    if (now > policy->first_bucket)
        policy->first_bucket = now;
}

static unsigned calendar_list(const struct tier *tier, ref place, uint32_t clock_s)
{
    const struct policy *policy = &tier->policy;
    uint64_t uses = tier->places[place].uses;

    if (uses > REWARD_USES_MAX)
        uses = REWARD_USES_MAX;
    return list_of_bucket(bucket_of_second(policy, clock_s + uses * policy->parameter));
}

/* The first list of the calendar with members; there is one. */
static unsigned calendar_first(const struct policy *policy)
{
    uint64_t bucket = policy->first_bucket;

    if (policy->lists[0].count)
        return 0;
    while (!policy->lists[list_of_bucket(bucket)].count)
        bucket++;
    return list_of_bucket(bucket);
}

/* -- the rules --------------------------------------------------------------------------------- */

/* In which list a place belongs, now. */
static unsigned list_of(struct tier *tier, ref place, uint32_t clock_s)
{
    struct policy *policy = &tier->policy;
    uint8_t uses = tier->places[place].uses;

    switch (policy->kind) {
    case POLICY_LFU:
        return uses < LISTS_MAX ? uses : LISTS_MAX - 1;
    case POLICY_SLRU:
        return uses >= policy->parameter;
    case POLICY_LHD:
        return density_cell(policy->density, &tier->places[place]);
    case POLICY_REWARD:
        calendar_turn(tier, clock_s);
        return calendar_list(tier, place, clock_s);
    default:
        return 0;
    }
}

/* The protected ones that are too many go back on probation, the least recently used first. */
static void bound_protected(struct tier *tier)
{
    struct policy *policy = &tier->policy;

    while (policy->kind == POLICY_SLRU && policy->lists[1].count > policy->protected_max) {
        ref place = policy->lists[1].oldest;

        policy_remove(tier, place);
        link_newest(tier, 0, place);
    }
}

static ref densest_last(struct policy *policy)
{
    struct density *density = policy->density;

    while (density->cursor < density->cells &&
           !policy->lists[density->order[density->cursor]].count)
        density->cursor++;
    if (density->cursor == density->cells ||
        density->worth[density->order[density->cursor]] > density->bound)
        return NONE;
    return policy->lists[density->order[density->cursor]].oldest;
}

void policy_insert(struct tier *tier, ref place, uint32_t clock_s)
{
    link_newest(tier, list_of(tier, place, clock_s), place);
    bound_protected(tier);
}

static bool by_arrival(const struct policy *policy)
{
    return policy->kind == POLICY_FIFO || policy->kind == POLICY_FILO;
}

void policy_use(struct tier *tier, ref place, uint32_t clock_s)
{
    struct place *at = &tier->places[place];

    if (at->uses < USES_MAX)
        at->uses++;
    if (by_arrival(&tier->policy))
        return;
    policy_remove(tier, place);
    link_newest(tier, list_of(tier, place, clock_s), place);
    bound_protected(tier);
}

static bool newest_goes(const struct policy *policy)
{
    return policy->kind == POLICY_MRU || policy->kind == POLICY_FILO;
}

void policy_return(struct tier *tier, ref place)
{
    if (newest_goes(&tier->policy))
        link_newest(tier, 0, place);
    else if (tier->policy.kind == POLICY_LHD)
        link_oldest(tier, list_of(tier, place, 0), place);
    else
        link_oldest(tier, 0, place);
}

void policy_unpark(struct tier *tier, ref place, uint32_t clock_s)
{
    if (by_arrival(&tier->policy))
        policy_return(tier, place);
    else
        policy_insert(tier, place, clock_s);
}

ref policy_victim(struct tier *tier, uint32_t clock_s)
{
    struct policy *policy = &tier->policy;

    if (policy->kind == POLICY_REWARD)
        calendar_turn(tier, clock_s);
    if (policy->kind == POLICY_LHD)
        return densest_last(policy);
    if (!policy->occupied)
        return NONE;
    if (newest_goes(policy))
        return policy->lists[0].newest;
    if (policy->kind == POLICY_REWARD)
        return policy->lists[calendar_first(policy)].oldest;
    return policy->lists[__builtin_ctzll(policy->occupied)].oldest;
}

const char *policy_check(const struct tier *tier)
{
    for (unsigned number = 0; number < tier->policy.list_count; number++) {
        const struct list *list = &tier->policy.lists[number];
        uint32_t count = 0;
        ref older = NONE;

        for (ref at = list->oldest; at != NONE; at = tier->places[at].newer) {
            const struct place *place = &tier->places[at];

            if (place->older != older || place->list != number || place->state != PLACE_READY)
                return "a policy's list is broken";
            older = at;
            if (++count > list->count)
                return "a policy's list is longer than its count";
        }
        if (list->newest != older || count != list->count)
            return "a policy's list is shorter than its count";
        if (tier->policy.density) {
            if (count && tier->policy.density->rank[number] < tier->policy.density->cursor)
                return "a cell has members before the cursor";
            continue;
        }
        if ((tier->policy.occupied >> number & 1) != (count > 0))
            return "a policy's list is wrongly marked as occupied";
    }
    return tier->policy.density ? density_check(tier->policy.density) : NULL;
}
