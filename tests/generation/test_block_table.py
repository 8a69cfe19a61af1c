"""The block table: every token has a place of its own, whatever is freed and taken again."""

import numpy as np

from telechat.generation.block_table import BlockTable


def test_sequences_grow_and_share_no_place():
    table = BlockTable(slots=2, length=10, block_size=4)
    assert table.count == 6 and table.table.shape == (2, 3)
    table.grow(0, 5)
    table.grow(1, 4)
    table.grow(0, 10)
    places = [table.places(0, np.arange(10)), table.places(1, np.arange(4))]
    assert len(set(np.concatenate(places))) == 14
    assert places[0].dtype == np.int32
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
