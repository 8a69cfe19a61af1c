"""Which checkpoint a run goes on from: the newest that is whole, or the one that is named; and of the same data only."""

import json
import os
import shutil

import pytest

from telechat import TeleChat, TrainConfig, Trainer
from telechat.data.packed_dataset import PackedDataset, same_data
from telechat.data.preprocess import preprocess
from telechat.data.mixture import MixtureFile
from telechat.data.tokenizer import Tokenizer
from telechat.errors import InputError
from telechat.training.resume import find_checkpoint, set_later_aside
from telechat.training.run_identity import check_same_run
from telechat.training.training_state import list_checkpoints, restore, save_training_checkpoint
from tests.conftest import ROOT, save_small_model

SAMPLES = ROOT / "samples"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's directory with checkpoints of steps 1 and 2, and its trainer."""
    folder = tmp_path_factory.mktemp("saved")
    save_small_model(folder / "model")
    trainer = Trainer(TeleChat.from_pretrained(folder / "model"), TrainConfig(total_steps=9))
    for step in (1, 2):
        trainer.step = step
        save_training_checkpoint(str(folder / "run"), trainer, {"seed": 0}, str(folder / "model"))
    return folder / "run", trainer


@pytest.fixture
def run(saved, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])


STATE = "training_state/state.json"
RANK = "training_state/rank-00000.safetensors"
DAMAGES = {
    "weights cut": lambda path: cut(path / "model.safetensors"),
    "weights of zeros": lambda path: (path / "model.safetensors").write_bytes(bytes(1000)),
    "no weights": lambda path: (path / "model.safetensors").unlink(),
    "no config": lambda path: (path / "config.json").unlink(),
    "config cut": lambda path: cut(path / "config.json"),
    "moments cut": lambda path: cut(path / RANK),
    "moments empty": lambda path: cut(path / RANK, 0),
    "no moments": lambda path: (path / RANK).unlink(),
    "state empty": lambda path: cut(path / STATE, 0),
    "state cut": lambda path: cut(path / STATE),
    "state of something else": lambda path: (path / STATE).write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(run, capsys, damage):
    damage(run / "checkpoint-000002")
    assert find_checkpoint(run, resume=True) == str(run / "checkpoint-000001")
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1
    assert str(run / "checkpoint-000002") in warning
    assert warning.endswith(f"passed over; the run goes on from {run / 'checkpoint-000001'}\n")


def test_a_part_of_the_moments_that_is_missing_is_damage(run, capsys):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    path = run / "checkpoint-000002" / RANK
    with safe_open(path, "np") as file:
        boxes = json.loads(file.metadata()["boxes"])
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("second."))
    del tensors[name], boxes[name]
    save_file(tensors, path, metadata={"boxes": json.dumps(boxes)})
    assert find_checkpoint(run, resume=True) == str(run / "checkpoint-000001")
    assert f"lacks a part of {name} (found 0 of" in capsys.readouterr().err


def test_a_whole_one_is_taken_without_a_word(run, capsys):
    assert find_checkpoint(run, resume=True) == str(run / "checkpoint-000002")
    assert capsys.readouterr().err == ""


def test_none_that_is_whole(run):
    for path in list_checkpoints(run):
        cut(run / path / "model.safetensors")
    with pytest.raises(InputError, match="--resume: no checkpoint in .*run is whole .*checkpoint-000002.*model.safetensors"):
        find_checkpoint(run, resume=True)


def test_resume_from_takes_the_one_that_is_named(run, tmp_path):
    one = run / "checkpoint-000001"
    assert find_checkpoint(run, resume_from=str(one)) == os.path.realpath(one)
    (run / "final").symlink_to("checkpoint-000001")
    assert find_checkpoint(run, resume=True, resume_from=run / "final") == os.path.realpath(one)
    assert find_checkpoint(tmp_path / "new", resume_from=one) == os.path.realpath(one)
    shutil.copytree(run, tmp_path / "other")
    with pytest.raises(InputError, match="other holds checkpoints of another run than --resume_from .*checkpoint-000001; "
                                         "give another output_dir"):
        find_checkpoint(tmp_path / "other", resume_from=one)
    for wrong in (run, tmp_path / "absent"):
        with pytest.raises(InputError, match=f"--resume_from {wrong}: is no checkpoint of a training run"):
            find_checkpoint(run, resume_from=wrong)
    cut(one / "model.safetensors")
    with pytest.raises(InputError, match="checkpoint-000001/model.safetensors is broken or cut short"):
        find_checkpoint(run, resume_from=one)


def test_later_checkpoints_are_set_aside(run):
    (run / "final").symlink_to("checkpoint-000002")
    for _ in range(2):  # an older one of that name goes
        assert set_later_aside(run, 1) == [str(run / "checkpoint-000002.set-aside")]
        assert list_checkpoints(run) == [str(run / "checkpoint-000001")]
        assert os.readlink(run / "final") == "checkpoint-000002.set-aside"
        shutil.copytree(run / "checkpoint-000002.set-aside", run / "checkpoint-000002")
        (run / "final").unlink()
        (run / "final").symlink_to("checkpoint-000002")
    assert set_later_aside(run, 2) == [] and len(list_checkpoints(run)) == 2


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """make(name, …) → `PackedDataset` of the samples."""
    folder = tmp_path_factory.mktemp("datasets")

    def make(name, tokenizer=SAMPLES / "tokenizer.model", file=SAMPLES / "conversations.jsonl", max_length=160, **more):
        preprocess([MixtureFile(str(file))], Tokenizer.from_pretrained(tokenizer), str(folder / name), max_length, **more)
        return PackedDataset(folder / name, 2)
    return make


def test_data_is_the_same_wherever_it_and_its_tokenizer_lie(datasets, tmp_path):
    shutil.copy(SAMPLES / "tokenizer.model", tmp_path / "t.model")
    shutil.copy(SAMPLES / "conversations.jsonl", tmp_path / "renamed.jsonl")
    one = datasets("one", eval_share=0.1).identity()
    other = datasets("other", tmp_path / "t.model", tmp_path / "renamed.jsonl", eval_share=0.1).identity()
    assert one["sources"] != other["sources"] and same_data(one, other)
    check_same_run("DIR", {"data": one}, {"data": other})


@pytest.mark.parametrize("change, said", [
    ({"max_length": 150}, "data.max_length 160, this run has 150"), ({"seed": 7}, "data.seed 2024, this run has 7"),
    ({"eval_share": 0.1}, "data.eval_share 0.0, this run has 0.1"),
    ({"edited": True}, "data.train.tokens 4562, this run has 456[0-9]"),
])
def test_what_differs_in_the_data_is_named_with_both_values(datasets, tmp_path, change, said):
    if change.pop("edited", False):
        change["file"] = tmp_path / "conversations.jsonl"
        change["file"].write_text((SAMPLES / "conversations.jsonl").read_text(encoding="utf-8").replace("。", "！！", 1),
                                  encoding="utf-8")
    with pytest.raises(InputError, match=f"^DIR was written with {said}; to resume, leave it unchanged$"):
        check_same_run("DIR", {"data": datasets("one").identity()}, {"data": datasets("changed", **change).identity()})


def test_equal_counts_do_not_make_data_equal(datasets, tmp_path):
    text = (SAMPLES / "conversations.jsonl").read_text(encoding="utf-8")
    (tmp_path / "conversations.jsonl").write_text(text.replace("1", "2"), encoding="utf-8")  # a token each
    one, other = datasets("one").identity(), datasets("edited", file=tmp_path / "conversations.jsonl").identity()
    assert one["train"] == other["train"] and not same_data(one, other)
    with pytest.raises(InputError, match="^DIR was written with data.sha256.train '[0-9a-f]{58,60}.*, this run has '"):
        check_same_run("DIR", {"data": one}, {"data": other})


def test_datasets_without_digests_are_told_apart_by_their_files(datasets):
    """As versions before this one wrote them."""
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        dataset = datasets(name, seed=seed)
        del dataset.info["sha256"]
        found.append(dataset.identity())
    assert same_data(found[0], found[1]) and not same_data(found[0], found[2])


def test_a_checkpoint_of_another_run_is_refused_by_one_key(saved):
    path, trainer = saved
    checkpoint = list_checkpoints(path)[-1]
    with pytest.raises(InputError, match=f"^{checkpoint} was written with seed 0, this run has 3; to resume, leave it"):
        restore(checkpoint, trainer, {"seed": 3})


def test_a_dataset_of_another_tokenizer_is_refused(datasets, tmp_path):
    dataset = datasets("one")
    dataset.check_tokenizer(Tokenizer.from_pretrained(SAMPLES))
    (tmp_path / "tokenizer.model").write_bytes((SAMPLES / "tokenizer.model").read_bytes() + b"\x1a\x00")
    with pytest.raises(InputError, match="one was made with another tokenizer than .*tokenizer.model, which goes with the "
                                         "model; run tools/preprocess.py again with --vocab_file_path "):
        dataset.check_tokenizer(Tokenizer.from_pretrained(tmp_path))
