"""Datasets: written whole or not at all, read back in an order that depends on seed and epoch alone."""

import itertools
import json
import os
import shutil

import mindspore.dataset
import numpy as np
import pytest

from telechat.data.mindrecord import write_dataset
from telechat.data.packed_dataset import PackedDataset
from telechat.data.packing import Packing
from telechat.errors import InputError

MAX_LENGTH = 6


def packing(count, first=0, max_length=MAX_LENGTH):
    """Packs of one conversation each, which fills its pack with its own number."""
    encoded = [(np.full(max_length, first + n, np.int32), np.full(max_length, first + n, np.int32))
               for n in range(count)]
    return Packing(encoded, range(count), max_length, pad_id=99)


def settings(max_length=MAX_LENGTH, vocab_size=120):
    return {"max_length": max_length, "tokens": {"pad": {"token": "<pad>", "id": 99}},
            "tokenizer": {"vocab_size": vocab_size}}


@pytest.fixture
def directory(tmp_path):
    """A dataset of 11 packs, and 5 held out, which are numbered from 50."""
    path = tmp_path / "dataset"
    write_dataset(path, {"train": packing(11), "eval": packing(5, first=50)}, settings())
    return path


def numbers(batch):
    return batch[0][:, -1].tolist()


def test_rows_come_back_as_written(directory):
    data = PackedDataset(directory, batch_size=11, shuffle=False)
    assert (data.max_length, data.num_packs, data.steps_per_epoch) == (MAX_LENGTH, 11, 1)
    input_ids, labels = next(data.batches())
    expected_ids, expected_labels = map(np.array, zip(*packing(11)))
    assert input_ids.dtype == labels.dtype == np.int32
    np.testing.assert_array_equal(input_ids, expected_ids)
    np.testing.assert_array_equal(labels, expected_labels)
    assert input_ids[3].tolist() == [99, 3, 3, 3, 3, 3, 3] and labels[3].tolist() == [-100, 3, 3, 3, 3, 3, 3]


def test_values_of_every_size_survive_the_file(tmp_path):
    """MindRecord stores small integers in fewer bytes."""
    rng = np.random.RandomState(0)
    encoded = [(rng.randint(0, 10**rng.randint(1, 6), 200).astype(np.int32),
                rng.randint(-100, 160256, 200).astype(np.int32)) for _ in range(40)]
    packs = Packing(encoded, range(40), 200, pad_id=3)
    write_dataset(tmp_path / "d", {"train": packs}, settings(200))
    for got, expected in zip(zip(*next(PackedDataset(tmp_path / "d", 40, shuffle=False).batches())), packs):
        np.testing.assert_array_equal(got, expected)


def test_any_mindspore_program_can_read_it(directory):
    rows = list(mindspore.dataset.MindDataset(str(directory / "train.mindrecord"), shuffle=False)
                .create_dict_iterator(num_epochs=1, output_numpy=True))
    assert [row["input_ids"][-1] for row in rows] == list(range(11))
    assert rows[0]["labels"].dtype == np.int32


def test_every_epoch_is_a_permutation_by_seed_and_epoch(directory):
    data = PackedDataset(directory, batch_size=4, seed=3)
    assert data.steps_per_epoch == 3
    stream = [number for batch in itertools.islice(data.batches(), 9) for number in numbers(batch)]
    epochs = [np.random.RandomState([3, epoch]).permutation(11).tolist() for epoch in range(4)]
    assert stream == sum(epochs, [])[:36]  # batches run on from one epoch into the next
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = PackedDataset(directory, batch_size=4, seed=4)
    assert [n for batch in itertools.islice(other.batches(), 9) for n in numbers(batch)] != stream


def test_resuming_at_any_step(directory):
    """Nine steps are three epochs and a bit of 11 packs."""
    whole = list(itertools.islice(PackedDataset(directory, batch_size=4, seed=3).batches(), 10))
    for start in range(10):
        resumed = PackedDataset(directory, batch_size=4, seed=3).batches(start)
        for expected in whole[start:]:
            got = next(resumed)
            np.testing.assert_array_equal(got[0], expected[0])
            np.testing.assert_array_equal(got[1], expected[1])


def test_resuming_reads_nothing_twice(directory, monkeypatch):
    data = PackedDataset(directory, batch_size=4, seed=3)
    asked = []
    rows = data._rows
    monkeypatch.setattr(data, "_rows", lambda indices: asked.append(len(indices)) or rows(indices))
    next(data.batches(1_000_000))
    assert asked == [11 - 4_000_000 % 11]


@pytest.mark.parametrize("num_shards", [2, 3, 6])
def test_global_batches_do_not_depend_on_the_shards(directory, num_shards):
    alone = PackedDataset(directory, batch_size=6, seed=5)
    shards = [PackedDataset(directory, batch_size=6, seed=5, num_shards=num_shards, shard_id=shard).batches(2)
              for shard in range(num_shards)]
    for expected in itertools.islice(alone.batches(2), 5):
        parts = [next(shard) for shard in shards]
        assert all(len(part[0]) == 6 // num_shards for part in parts)
        np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), expected[0])
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), expected[1])


def test_a_batch_larger_than_the_dataset(directory):
    data = PackedDataset(directory, batch_size=25, seed=1)
    got = numbers(next(data.batches()))
    assert data.steps_per_epoch == 1
    assert sorted(got[:11]) == sorted(got[11:22]) == list(range(11)) and len(got) == 25


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_evaluation_is_one_pass_of_equal_batches(directory, num_shards):
    shards = [PackedDataset(directory, 4, split="eval", num_shards=num_shards, shard_id=shard)
              for shard in range(num_shards)]
    shards = [list(shard.evaluation_batches()) for shard in shards]
    batches = [tuple(np.concatenate([shard[step][part] for shard in shards]) for part in (0, 1))
               for step in range(2)]
    assert [len(shard) for shard in shards] == [2] * num_shards
    assert [numbers(batch) for batch in batches] == [[50, 51, 52, 53], [54, 99, 99, 99]]
    assert (batches[1][1][1:] == -100).all() and batches[1][1].dtype == np.int32
    assert batches[0][1][0].tolist() == [-100, 50, 50, 50, 50, 50, 50]
    kept_apart = PackedDataset(directory, 4, split="eval", num_shards=num_shards, shard_id=num_shards - 1, segment_ids=True)
    last = list(kept_apart.evaluation_batches())[1]
    assert {part.shape for part in last} == {(4 // num_shards, 7)} and not last[2][-1].any()


def test_a_dataset_of_one_pack(tmp_path):
    write_dataset(tmp_path / "one", {"train": packing(1, first=7)}, settings())
    batches = PackedDataset(tmp_path / "one", 2).batches()
    assert [numbers(next(batches)) for _ in range(2)] == [[7, 7], [7, 7]]


def test_what_dataset_json_says(directory):
    info = json.loads((directory / "dataset.json").read_text(encoding="utf-8"))
    assert info["train"] == packing(11).counts and info["eval"] == packing(5).counts
    assert info["train"]["tokens"] == 66 and info["train"]["padding_share"] == pytest.approx(1 / 7)
    assert info["files"] == {path.name: path.stat().st_size for path in directory.iterdir()
                             if path.name != "dataset.json"}
    assert max(info["files"].values()) < 2 << 20  # a small dataset is a small file
    assert PackedDataset(directory, 1).info == info


def test_a_dataset_is_replaced_with_all_its_files(directory):
    (directory / "notes.txt").write_text("mine")
    write_dataset(directory, {"train": packing(3)}, settings())
    assert sorted(os.listdir(directory)) == [
        "dataset.json", "notes.txt", "train.mindrecord", "train.mindrecord.db"]
    assert PackedDataset(directory, 1).num_packs == 3
    with pytest.raises(InputError, match="has no held-out part.*--eval_share"):
        PackedDataset(directory, 1, split="eval")


def test_a_failure_while_writing_leaves_the_old_dataset(directory, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    class Interrupted(Packing):
        def __iter__(self):
            yield from itertools.islice(super().__iter__(), 2)
            raise OSError(28, "No space left on device")

    broken = Interrupted([(np.zeros(4, np.int32),) * 2] * 3, range(3), MAX_LENGTH, 0)
    with pytest.raises(InputError, match="dataset cannot be written .No space left on device"):
        write_dataset(directory, {"train": broken}, settings())
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    with pytest.raises(InputError):
        write_dataset(tmp_path / "new" / "one", {"train": broken}, settings())
    assert not (tmp_path / "new" / "one").exists()


def test_a_disk_that_is_too_small_is_known_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 500, 500))
    with pytest.raises(InputError, match="d needs up to 0.0 MiB and the disk has 0.0 MiB left; free some"):
        write_dataset(tmp_path / "d", {"train": packing(11)}, settings())  # 11 · 7 · 8 = 616 bytes
    assert not (tmp_path / "d").exists()
    write_dataset(tmp_path / "d", {"train": packing(8)}, settings())  # 448 bytes
    assert PackedDataset(tmp_path / "d", 1).num_packs == 8


def test_fits_the_model(directory):
    data = PackedDataset(directory, 1)
    data.check_fits(vocab_size=120, sequence_length=MAX_LENGTH)
    for length in (MAX_LENGTH - 1, MAX_LENGTH + 1):
        with pytest.raises(InputError, match=f"sequences of 6 tokens and the run is set to {length}"):
            data.check_fits(vocab_size=120, sequence_length=length)
    with pytest.raises(InputError, match="tokenizer of 120 tokens and the model's embedding has 119 rows"):
        data.check_fits(vocab_size=119, sequence_length=MAX_LENGTH)


def rewrite(path, change):
    info = json.loads(path.read_text(encoding="utf-8"))
    change(info)
    path.write_text(json.dumps(info), encoding="utf-8")


def test_directories_that_are_no_dataset(directory, tmp_path):
    with pytest.raises(InputError, match="dataset.json cannot be read .No such file.* tools/preprocess.py"):
        PackedDataset(tmp_path / "nowhere", 1)
    (directory / "train.mindrecord.db").unlink()
    with pytest.raises(InputError, match="train.mindrecord.db is missing"):
        PackedDataset(directory, 1)
    (directory / "dataset.json").write_text('{"train": ')
    with pytest.raises(InputError, match="dataset.json is not valid JSON"):
        PackedDataset(directory, 1)
    for other in ("[]", "{}", '{"settings": {"max_length": 6}, "train": null}'):
        (directory / "dataset.json").write_text(other)
        with pytest.raises(InputError, match="dataset.json (does not describe a dataset|must hold a JSON object)"):
            PackedDataset(directory, 1)


def test_truncated_and_mixed_files(directory, tmp_path):
    file = directory / "train.mindrecord"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    error = f"train.mindrecord has {len(whole) - 100} bytes and not the {len(whole)}"
    with pytest.raises(InputError, match=error):
        PackedDataset(directory, 1)
    # A byte of the header changed: MindSpore would end the process.
    file.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    with pytest.raises(InputError, match="train.mindrecord is damaged or from another dataset: .*; copy it again, or run"):
        PackedDataset(directory, 1)
    file.write_bytes(whole)
    rewrite(directory / "dataset.json", lambda info: info.pop("digests"))  # as older datasets are
    assert PackedDataset(directory, 1).num_packs == 11
    # Rows of another length, in a file that dataset.json seems to describe.
    write_dataset(tmp_path / "other", {"train": packing(11, max_length=9)}, settings(9))
    sizes = {}
    for name in ("train.mindrecord", "train.mindrecord.db"):
        shutil.copy(tmp_path / "other" / name, directory / name)
        sizes[name] = (directory / name).stat().st_size
    rewrite(directory / "dataset.json", lambda info: info["files"].update(sizes))
    with pytest.raises(InputError, match=r"wrong or mixed dataset: a row is int32 of shape \(10,\)"):
        PackedDataset(directory, 1)
    # Something that is no MindRecord at all.
    file.write_bytes(b"\0" * 5000)
    rewrite(directory / "dataset.json", lambda info: info["files"].update({file.name: 5000}))
    with pytest.raises(InputError, match="train.mindrecord cannot be read as MindRecord"):
        PackedDataset(directory, 1)


@pytest.mark.parametrize("arguments, error", [
    ({"batch_size": 0}, "batch_size must be a whole number of 1 or more, not 0"),
    ({"batch_size": 2.0}, "batch_size must be a whole number of 1 or more, not 2.0"),
    ({"batch_size": 4, "seed": -1}, "seed must be a whole number from 0 to 4294967295"),
    ({"batch_size": 4, "num_shards": 0}, "num_shards must be a whole number of 1 or more"),
    ({"batch_size": 4, "num_shards": 2, "shard_id": 2}, "shard_id must be a whole number from 0 to 1, not 2"),
    ({"batch_size": 4, "shard_id": 1}, "shard_id must be a whole number from 0 to 0, not 1"),
    ({"batch_size": 4, "num_shards": 3}, "batch_size 4 must be a multiple of the 3 data-parallel ranks"),
    ({"batch_size": 4, "split": "test"}, 'split must be "train" or "eval", not .test.'),
])
def test_bad_arguments(directory, arguments, error):
    with pytest.raises(InputError, match=error):
        PackedDataset(directory, **arguments)


def test_bad_start_step(directory):
    with pytest.raises(InputError, match="start_step must be a whole number of 0 or more, not -1"):
        next(PackedDataset(directory, 4).batches(-1))
