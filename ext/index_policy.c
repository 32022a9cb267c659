/* Eviction order. A policy is a few lists, and rules about which list and which end goes first.
 *
 *   LRU, MRU     list 0 by last use; the oldest, or the newest, goes
 *   FIFO, FILO   list 0 by arrival; the oldest, or the newest, goes
 *   LFU          list u: those used u times, by last use; the lowest list goes first
 *   SLRU         list 0 on probation, list 1 protected: used often enough, at most 4/5 of the tier
 *   LHD          a list for each class and epoch of last use; the list whose places are worth least
 *                goes first (index_density.c)
 *   REWARD       a calendar: each use keeps a place for some seconds more. List 0 is overdue; the
 *                others are a ring of buckets of time, from `first_bucket` on
 *
 * A tier has one such set of lists, and one more for each namespace with a quota. The tier's next
 * victim is the one of these sets' victims that goes first by its epoch, or under LHD by its worth.
 */
#include "index_core.h"
#include "index_density.h"

#include <stdlib.h>

#define USES_MAX UINT8_MAX
#define RING (LISTS_MAX - 1)
#define BUCKETS_A_USE 4
#define REWARD_USES_MAX ((RING - 2) / BUCKETS_A_USE)
#define EPOCHS_A_TIER 64

bool policy_open(struct policy *policy, enum policy_kind kind, uint32_t parameter,
                 uint32_t capacity)
{
    unsigned count = kind == POLICY_LHD ? CELLS : LISTS_MAX;

    *policy = (struct policy){.kind = kind, .parameter = parameter, .list_count = count};
    policy->protected_max = (uint32_t)((uint64_t)capacity * 4 / 5);
    policy->lists = malloc(count * sizeof(*policy->lists));
    for (unsigned i = 0; policy->lists && i < count; i++)
        policy->lists[i] = (struct list){NONE, NONE, 0};
    return policy->lists;
}

void policy_close(struct policy *policy)
{
    free(policy->lists);
    policy->lists = NULL;
}

bool tier_policy_open(struct tier *tier, enum policy_kind kind, uint32_t parameter)
{
    while ((uint64_t)EPOCHS_A_TIER << tier->epoch_shift < tier->capacity)
        tier->epoch_shift++;
    if (kind == POLICY_LHD && !(tier->density = density_new(tier->capacity)))
        return false;
    tier->policy_count = 1;
    return policy_open(&tier->policies[0], kind, parameter, tier->capacity);
}

static struct policy *policy_of(struct tier *tier, ref place)
{
    return &tier->policies[tier->places[place].quota];
}

/* Note that a list has its first member, or lost its last. */
static void occupy(const struct tier *tier, struct policy *policy, unsigned number, bool occupied)
{
    if (!tier->density)
        policy->occupied = (policy->occupied & ~(UINT64_C(1) << number)) |
                           (uint64_t)occupied << number;
    else if (occupied && tier->density->rank[number] < policy->cursor)
        policy->cursor = tier->density->rank[number];
}

/* Return the link to the place after `older`; the list's own if that is NONE. */
static ref *link_after(struct tier *tier, struct list *list, ref older)
{
    return older == NONE ? &list->oldest : &tier->places[older].newer;
}

/* Return the link to the place before `newer`; the list's own if that is NONE. */
static ref *link_before(struct tier *tier, struct list *list, ref newer)
{
    return newer == NONE ? &list->newest : &tier->places[newer].older;
}

/* Add a place to a list between two neighbours, or at an end. */
static void link_between(struct tier *tier, unsigned number, ref place, ref older, ref newer)
{
    struct policy *policy = policy_of(tier, place);
    struct list *list = &policy->lists[number];
    struct place *at = &tier->places[place];

    at->list = (uint16_t)number;
    at->older = older;
    at->newer = newer;
    *link_after(tier, list, older) = place;
    *link_before(tier, list, newer) = place;
    if (!list->count++)
        occupy(tier, policy, number, true);
}

static void link_newest(struct tier *tier, unsigned number, ref place)
{
    link_between(tier, number, place, policy_of(tier, place)->lists[number].newest, NONE);
}

static void link_oldest(struct tier *tier, unsigned number, ref place)
{
    link_between(tier, number, place, NONE, policy_of(tier, place)->lists[number].oldest);
}

void policy_remove(struct tier *tier, ref place)
{
    struct policy *policy = policy_of(tier, place);
    struct place *at = &tier->places[place];
    struct list *list;

    if (at->list >= LIST_PARKED) {
        at->list = LIST_NONE;
        return;
    }
    list = &policy->lists[at->list];
    *link_after(tier, list, at->older) = at->newer;
    *link_before(tier, list, at->newer) = at->older;
    if (!--list->count)
        occupy(tier, policy, at->list, false);
    at->list = LIST_NONE;
}

void policy_splice(struct tier *tier, struct policy *policy, unsigned from, unsigned to)
{
    while (policy->lists[from].oldest != NONE) {
        ref place = policy->lists[from].oldest;

        policy_remove(tier, place);
        link_newest(tier, to, place);
    }
}

void policy_move(struct tier *tier, ref place, uint8_t quota)
{
    unsigned list = tier->places[place].list;

    if (list >= LIST_PARKED) {
        tier->places[place].quota = quota;
        return;
    }
    policy_remove(tier, place);
    tier->places[place].quota = quota;
    link_newest(tier, list, place);
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

/* Move the places that are due by now to list 0, in the order of their buckets. */
static void calendar_turn(struct tier *tier, struct policy *policy, uint32_t clock_s)
{
    uint64_t now = bucket_of_second(policy, clock_s), bucket = policy->first_bucket;

    for (unsigned turns = 0; bucket < now && turns < RING; bucket++, turns++)
        policy_splice(tier, policy, list_of_bucket(bucket), 0);
    if (now > policy->first_bucket)
        policy->first_bucket = now;
}

static unsigned calendar_list(const struct policy *policy, uint64_t uses, uint32_t clock_s)
{
    if (uses > REWARD_USES_MAX)
        uses = REWARD_USES_MAX;
    return list_of_bucket(bucket_of_second(policy, clock_s + uses * policy->parameter));
}

/* Return the first list of the calendar that has members; at least one must. */
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

/* Return the list in which a place belongs now. */
static unsigned list_of(struct tier *tier, ref place, uint32_t clock_s)
{
    struct policy *policy = policy_of(tier, place);
    uint8_t uses = tier->places[place].uses;

    switch (policy->kind) {
    case POLICY_LFU:
        return uses < LISTS_MAX ? uses : LISTS_MAX - 1;
    case POLICY_SLRU:
        return uses >= policy->parameter;
    case POLICY_LHD:
        return density_cell(tier->density, &tier->places[place]);
    case POLICY_REWARD:
        calendar_turn(tier, policy, clock_s);
        return calendar_list(policy, uses, clock_s);
    default:
        return 0;
    }
}

/* Put protected places beyond the maximum back on probation, the least recently used first. */
static void bound_protected(struct tier *tier, struct policy *policy)
{
    while (policy->kind == POLICY_SLRU && policy->lists[1].count > policy->protected_max) {
        ref place = policy->lists[1].oldest;

        policy_remove(tier, place);
        link_newest(tier, 0, place);
    }
}

static void link_used(struct tier *tier, ref place, uint32_t clock_s)
{
    if (!tier->density)
        tier->places[place].epoch = (uint16_t)(tier->touched++ >> tier->epoch_shift);
    link_newest(tier, list_of(tier, place, clock_s), place);
    bound_protected(tier, policy_of(tier, place));
}

void policy_insert(struct tier *tier, ref place, uint32_t clock_s)
{
    link_used(tier, place, clock_s);
}

static bool by_arrival(const struct tier *tier)
{
    return tier->policies[0].kind == POLICY_FIFO || tier->policies[0].kind == POLICY_FILO;
}

void policy_use(struct tier *tier, ref place, uint32_t clock_s)
{
    struct place *at = &tier->places[place];
    bool was_spent = at->spent;

    at->spent = false;
    if (at->uses < USES_MAX)
        at->uses++;
    if (by_arrival(tier) && !was_spent)
        return;
    policy_remove(tier, place);
    link_used(tier, place, clock_s);
}

static bool newest_goes(const struct tier *tier)
{
    return tier->policies[0].kind == POLICY_MRU || tier->policies[0].kind == POLICY_FILO;
}

void policy_return(struct tier *tier, ref place)
{
    if (newest_goes(tier))
        link_newest(tier, 0, place);
    else if (tier->density)
        link_oldest(tier, density_cell(tier->density, &tier->places[place]), place);
    else
        link_oldest(tier, 0, place);
}

/* LFU goes by the number of uses alone, so the place stays in its list. */
void policy_spend(struct tier *tier, ref place)
{
    struct place *at = &tier->places[place];
    bool by_uses = tier->policies[0].kind == POLICY_LFU;
    uint16_t now = (uint16_t)(tier->touched >> tier->epoch_shift);
    unsigned list = at->list;

    at->spent = true;
    if (!by_uses)
        at->uses = 0;
    if (tier->density)
        density_forget(tier->density, at);
    else /* as long ago as `epoch` can say */
        at->epoch = newest_goes(tier) ? now : (uint16_t)(now - (1u << 15));
    if (list >= LIST_PARKED)
        return;
    policy_remove(tier, place);
    if (by_uses)
        link_oldest(tier, list, place);
    else
        policy_return(tier, place);
}

void policy_unpark(struct tier *tier, ref place, uint32_t clock_s)
{
    if (by_arrival(tier) || tier->places[place].spent)
        policy_return(tier, place);
    else
        policy_insert(tier, place, clock_s);
}

/* -- victims ----------------------------------------------------------------------------------- */

static ref densest_last(const struct tier *tier, struct policy *policy)
{
    const struct density *density = tier->density;

    while (policy->cursor < density->cells && !policy->lists[density->order[policy->cursor]].count)
        policy->cursor++;
    if (policy->cursor == density->cells ||
        density->worth[density->order[policy->cursor]] > density->bound)
        return NONE;
    return policy->lists[density->order[policy->cursor]].oldest;
}

ref policy_victim_of(struct tier *tier, unsigned quota, uint32_t clock_s)
{
    struct policy *policy = &tier->policies[quota];

    if (tier->density)
        return densest_last(tier, policy);
    if (policy->kind == POLICY_REWARD)
        calendar_turn(tier, policy, clock_s);
    if (!policy->occupied)
        return NONE;
    if (newest_goes(tier))
        return policy->lists[0].newest;
    if (policy->kind == POLICY_REWARD)
        return policy->lists[calendar_first(policy)].oldest;
    return policy->lists[__builtin_ctzll(policy->occupied)].oldest;
}

/* Return whether one victim goes before another. */
static bool goes_before(const struct tier *tier, ref one, ref other)
{
    const struct place *a = &tier->places[one], *b = &tier->places[other];
    uint16_t now = (uint16_t)(tier->touched >> tier->epoch_shift);

    if (tier->density)
        return tier->density->worth[a->list] < tier->density->worth[b->list];
    return ((uint16_t)(now - a->epoch) > (uint16_t)(now - b->epoch)) != newest_goes(tier);
}

ref policy_victim(struct tier *tier, uint32_t clock_s)
{
    ref victim = policy_victim_of(tier, 0, clock_s);

    for (unsigned quota = 1; quota < tier->policy_count; quota++) {
        ref own = policy_victim_of(tier, quota, clock_s);

        if (own != NONE && (victim == NONE || goes_before(tier, own, victim)))
            victim = own;
    }
    return victim;
}

static const char *lists_check(const struct tier *tier, unsigned quota)
{
    const struct policy *policy = &tier->policies[quota];

    for (unsigned number = 0; number < policy->list_count; number++) {
        const struct list *list = &policy->lists[number];
        uint32_t count = 0;
        ref older = NONE;

        for (ref at = list->oldest; at != NONE; at = tier->places[at].newer) {
            const struct place *place = &tier->places[at];

            if (place->older != older || place->list != number || place->quota != quota ||
                place->state != PLACE_READY)
                return "a policy's list is broken";
            older = at;
            if (++count > list->count)
                return "a policy's list is longer than its count";
        }
        if (list->newest != older || count != list->count)
            return "a policy's list is shorter than its count";
        if (!tier->density && (policy->occupied >> number & 1) != (count > 0))
            return "a policy's list is wrongly marked as occupied";
        if (tier->density && count && tier->density->rank[number] < policy->cursor)
            return "a list before the cursor has members";
    }
    return NULL;
}

const char *policy_check(const struct tier *tier)
{
    for (unsigned quota = 0; quota < tier->policy_count; quota++) {
        const char *broken = lists_check(tier, quota);

        if (broken)
            return broken;
    }
    return tier->density ? density_check(tier->density) : NULL;
}
