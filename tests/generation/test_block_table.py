"""The blocks of a cache: every token has a place of its own, what begins alike shares blocks, and nothing is lost."""

import numpy as np

from telechat.generation.block_table import BlockTable


def test_sequences_grow_and_share_no_place():
    table = BlockTable(slots=2, length=10, block_size=4)
    assert table.pool.count == 6 and table.table.shape == (2, 3)
    assert table.grow(0, 5) and table.grow(1, 4) and table.grow(0, 10)
    places = [table.places(0, np.arange(10)), table.places(1, np.arange(4))]
    assert len(set(np.concatenate(places))) == 14
    assert places[0].dtype == np.int32 and min(map(min, places)) >= 4, "nobody is given the first block"
    for slot, found in enumerate(places):
        positions = np.arange(len(found))
        assert np.array_equal(found, table.table[slot][positions // 4] * 4 + positions % 4)


def test_a_sequence_keeps_its_places_while_another_is_replaced():
    table = BlockTable(slots=2, length=8, block_size=4)
    table.grow(0, 8)
    table.grow(1, 3)
    kept = table.places(1, np.arange(3)).tolist()
    for length in (3, 8, 5):
        table.clear(0)
        assert table.table[0].tolist() == [0, 0]
        table.grow(0, length)
        places = table.places(0, np.arange(length)).tolist()
        assert not set(places) & set(kept)
        assert len(set(places)) == length
    assert table.places(1, np.arange(3)).tolist() == kept
    assert table.places(1, 2) == kept[2]


def test_where_there_are_not_enough_blocks_none_is_taken():
    table = BlockTable(slots=2, length=12, block_size=4, count=3)
    assert table.grow(0, 8) and not table.grow(1, 5) and table.pool.available == 1
    assert table.table[1].tolist() == [0, 0, 0] and table.grow(1, 4) and not table.grow(0, 9)
    table.clear(0)
    assert table.pool.available == 2 and table.grow(1, 12)


def hold(table, slot, ids, **sharing):
    """A sequence that is begun and computed to its end: the tokens that were there before."""
    found = table.begin(slot, ids, **sharing)
    assert table.grow(slot, len(ids))
    table.remember(slot, ids, len(ids))
    return found


def test_full_blocks_of_the_same_tokens_behind_the_same_are_shared():
    table, ids = BlockTable(slots=3, length=16, block_size=4), list(range(10))
    assert hold(table, 0, ids) == 0
    assert hold(table, 1, ids) == 8 and table.table[1, :2].tolist() == table.table[0, :2].tolist()
    assert table.table[1, 2] != table.table[0, 2], "it is not full"
    # The last token is always computed: its logits are wanted.
    assert hold(table, 2, ids[:8]) == 4
    # The same tokens behind others are something else; so are those of another root.
    assert hold(table, 2, ids[:2] + [0, 0] + ids[4:]) == 0
    assert hold(table, 2, ids, root=40) == 0 and hold(table, 2, ids, root=40) == 9
    assert (table.hits, table.misses) == (8 + 4 + 9, 10 + 2 + 4 + 10 + 10 + 1)


def test_the_last_block_goes_to_who_goes_on_in_it():
    table, ids = BlockTable(slots=2, length=16, block_size=4), list(range(7))
    hold(table, 0, ids)
    last = table.table[0, 1]
    assert hold(table, 1, ids + [7, 8]) == 4, "it is in use"
    table.clear(0)
    # Behind the same tokens, as far as they are the same; under another root nothing is.
    assert table.needed(ids[:5] + [0, 0]) == (1, 5, None) and table.needed(ids, root=40)[1] == 0
    assert table.begin(0, ids + [9]) == 7 and table.table[0, 1] == last and table.pool.available == 8 - 4
    # Whoever goes before anything is computed gives it back as it was; of two last blocks behind the same the newer one stays.
    assert hold(table, 0, ids[:4] + [6, 6, 6]) == 4
    table.clear(0)
    assert table.begin(0, ids) == 4 and table.pool.available == 8 - 3
    assert table.begin(0, ids[:4] + [6, 6, 6]) == 6
    table.clear(0)
    table.clear(1)
    assert table.pool.available == 8


def test_what_depends_on_more_than_tokens_before_is_not_shared():
    table, ids = BlockTable(slots=2, length=16, block_size=4), list(range(14))
    hold(table, 0, ids, shareable=11)
    assert hold(table, 1, ids) == 8, "the third block ends behind token 11"
    assert hold(table, 1, ids, shareable=7) == 4


def test_blocks_are_kept_after_their_sequence_and_the_longest_unused_goes_first():
    table = BlockTable(slots=1, length=16, block_size=4, count=5)
    first, second = list(range(9)), list(range(50, 59))
    hold(table, 0, first)
    hold(table, 0, second)
    # Three known blocks of each, of which the second one's last took the place of the first one's; a third sequence takes the
    # last that is left of the first.
    assert table.pool.available == 5 - 3 and table.pool.evictions == 1
    hold(table, 0, list(range(80, 84)))
    assert table.pool.evictions == 2
    assert table.begin(0, first) == 4 and table.begin(0, second) == 8
    table.clear(0)
    table.forget_all()
    assert table.begin(0, second) == 0 and table.pool.available == table.pool.count == 5


def test_random_sequences_never_disturb_each_other():
    """Against a plain account of what every place was last written with: what a sequence reads is what it is made of."""
    random = np.random.default_rng(0)
    table = BlockTable(slots=4, length=24, block_size=4, count=13)
    written, running = {}, {}
    for step in range(3000):
        slot = int(random.integers(4))
        if slot in running and random.random() < 0.3:
            table.clear(slot)
            del running[slot]
        elif slot not in running:
            ids = random.integers(0, 2, int(random.integers(1, 13))).tolist()
            blocks, known, _ = table.needed(ids)
            if blocks > table.pool.available:
                continue
            found = table.begin(slot, ids)
            assert found == known and table.grow(slot, len(ids))
            for position in range(found, len(ids)):
                written[int(table.places(slot, position))] = ids[:position + 1]
            table.remember(slot, ids, len(ids))
            running[slot] = ids
        elif len(running[slot]) < 24 and table.grow(slot, len(running[slot]) + 1):
            running[slot].append(int(random.integers(2)))
            written[int(table.places(slot, len(running[slot]) - 1))] = list(running[slot])
            table.remember(slot, running[slot], len(running[slot]))
        for other, ids in running.items():
            for position in range(len(ids)):
                assert written[int(table.places(other, position))] == ids[:position + 1], step
    for slot in range(4):
        table.clear(slot)
    assert table.pool.available == 13 and table.hits > 300 and table.pool.evictions > 100
