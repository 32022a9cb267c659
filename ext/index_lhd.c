/* The policy LHD in a tier: how a prompt that is asked for changes places, and when epochs end. */
#include "index_core.h"

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
    if (place->uses < UINT8_MAX)
        place->uses++;
    place->class = (uint8_t)density_class_of(place->uses, false);
    place->epoch = (uint16_t)density->epoch;
    if (listed)
        policy_insert(tier, id, 0);
}

/* Learn from a prompt; `nodes` has the nodes of its first `known` blocks. */
void lhd_asked(struct block_index *index, unsigned t, const struct batch *prompt,
               const ref *nodes, size_t known)
{
    struct tier *tier = &index->tier[t];
    struct density *density = tier->density;
    uint32_t turn_at = tier->capacity < EPOCH_PART ? 1 : tier->capacity / EPOCH_PART;
    uint32_t uses = 0;

    if (asked_again(density, prompt))
        return;
    for (size_t j = prompt->blocks; j-- > 0;) {
        struct key key = key_at(prompt->keys, (int64_t)j);
        ref id = j < known && nodes[j] != NONE ? node_at(index, nodes[j])->place[t] : NONE;
        unsigned class;

        if (id != NONE && tier->places[id].state == PLACE_READY) {
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
