/* The policy LHD in a tier: how a prompt that is asked for changes places, and when epochs end. */
#include "index_density.h"

#define EPOCH_PART 8

/* Begin the next epoch: places that reach the greatest age join the ancient, old samples end. */
static void epoch_turn(struct tier *tier)
{
    uint32_t leaves;

    density_age(tier->density);
    leaves = tier->density->epoch - (EPOCHS - 1);
    for (unsigned quota = 0; quota < tier->policy_count; quota++)
        for (unsigned class = 0; class < CLASSES; class++)
            policy_splice(tier, &tier->policies[quota],
                          class * CELLS_OF_CLASS + leaves % EPOCHS,
                          class * CELLS_OF_CLASS + ANCIENT);
}

/* Return whether the prompt is among those asked for last and this is the second time, such as a
 * get after its match, or a retry. The third time counts as a use again. */
static bool asked_again(struct density *density, const struct batch *prompt)
{
    uint64_t name = prompt->blocks;

    if (!prompt->blocks)
        return true;
    name = name << 32 | key_at(prompt->keys, (int64_t)prompt->blocks - 1).word[3];
    for (unsigned i = 0; i < ASKED_LAST; i++)
        if (density->asked_last[i] == name) {
            density->asked_last[i] = 0;
            return true;
        }
    density->asked_last[density->asked_next++ % ASKED_LAST] = name;
    return false;
}

static void place_asked(struct tier *tier, ref id)
{
    struct density *density = tier->density;
    struct place *place = &tier->places[id];
    bool listed = place->list < LIST_PARKED;

    if (listed)
        policy_remove(tier, id);
    place->spent = false;
    if (place->uses < UINT8_MAX)
        place->uses++;
    place->class = (uint8_t)density_class_of(place->uses, false);
    place->epoch = (uint16_t)density->epoch;
    if (listed)
        policy_insert(tier, id, 0);
}

/* Return the READY place of a node, or NONE; the node may be NONE. */
static ref ready_place(const struct block_index *index, unsigned t, ref node)
{
    ref id = node == NONE ? NONE : node_at(index, node)->place[t];

    return id != NONE && index->tier[t].places[id].state == PLACE_READY ? id : NONE;
}

/* Only the chain is sampled: a leaf is taken to come back as often as the chain at its position. */
static void leaves_asked(const struct block_index *index, struct tier *tier, unsigned t,
                         const struct reach *reach, size_t position)
{
    for (unsigned group = 1; group < index->groups; group++) {
        ref id = ready_place(index, t, reach_leaf(index, reach, group, position));

        if (id != NONE)
            place_asked(tier, id);
    }
}

void lhd_asked(struct block_index *index, unsigned t, const struct batch *prompt,
               const ref *nodes, size_t known, const struct reach *reach)
{
    struct tier *tier = &index->tier[t];
    struct density *density = tier->density;
    uint32_t turn_at = tier->capacity < EPOCH_PART ? 1 : tier->capacity / EPOCH_PART;
    uint32_t uses = 0;

    if (asked_again(density, prompt))
        return;
    for (size_t j = prompt->blocks; j-- > 0;) {
        struct key key = key_at(prompt->keys, (int64_t)j);
        ref id = ready_place(index, t, j < known ? nodes[j] : NONE);
        unsigned class;

        if (reach)
            leaves_asked(index, tier, t, reach, j);
        if (id != NONE) {
            place_asked(tier, id);
            class = tier->places[id].class;
        } else {
            struct recent_entry *marker = recent_find(&density->markers, key);

            if (marker) {
                if (marker->value < UINT8_MAX)
                    marker->value++;
                if (marker->value > uses)
                    uses = marker->value;
                recent_touch(&density->markers, marker);
            } else if (j + 2 == prompt->blocks) {
                recent_add(&density->markers, key, uses);
            }
            class = density_class_of(uses, j + 1 == prompt->blocks);
        }
        density_sample(density, key, class, true);
    }
    density->asked += prompt->blocks;
    if (density->asked < turn_at)
        return;
    for (unsigned turns = 0; density->asked >= turn_at && turns < EPOCHS; turns++) {
        density->asked -= turn_at;
        epoch_turn(tier);
    }
    density->asked %= turn_at;
    density_learn(density);
    for (unsigned quota = 0; quota < tier->policy_count; quota++)
        tier->policies[quota].cursor = 0;
}
