"""What a run needs of memory and disk, and that it is refused before anything is read or written."""

import dataclasses
import math
import os
import types

import pytest

from telechat import InputError, TeleChat, TeleChatConfig
from telechat.data import PackedDataset
from telechat.training import resources
from telechat.training.description import _epochs, describe_run
from telechat.training.memory import fullest_rank, memory_lines
from telechat.training.resources import checkpoint_bytes, checkpoints_at_once, directory_bytes
from telechat.training.run import TrainingRun
from telechat.training.run_config import RunConfig
from tests.conftest import preprocess_samples, save_small_model

LENGTH = 64


@pytest.fixture(scope="module")
def run_config(tmp_path_factory):
    """A `RunConfig` that works, and what it starts from."""
    folder = tmp_path_factory.mktemp("resources")
    save_small_model(folder / "model")
    preprocess_samples(folder / "data", max_length=LENGTH)
    return RunConfig.from_dict({"train_dataset": str(folder / "data"), "load_checkpoint": str(folder / "model"),
                                "output_dir": str(folder / "out"), "batch_size": 2, "total_steps": 2, "save_steps": 1})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_as_large_as_said(run_config, dtype, tmp_path):
    config = dataclasses.replace(run_config, output_dir=str(tmp_path / "out"),
                                 train=dataclasses.replace(run_config.train, dtype=dtype, total_steps=1))
    run = TrainingRun(config)
    path, _ = run.run()
    expected = checkpoint_bytes(run.model_config, dtype)
    headers = directory_bytes(path) - expected  # of the files, and tokenizer.model
    assert 0 < headers < 100_000 + os.path.getsize(os.path.join(path, "tokenizer.model"))


def test_an_interrupted_run_keeps_its_step_and_has_no_final_weights(run_config, tmp_path, monkeypatch):
    monkeypatch.setattr("telechat.training.run.StopSignal",
                        lambda scheduler: types.SimpleNamespace(received=True, restore=lambda: None))
    run = TrainingRun(dataclasses.replace(run_config, output_dir=str(tmp_path / "out"), save_steps=0))
    path, finished = run.run()
    assert (os.path.basename(path), finished) == ("checkpoint-000001", False)
    assert not os.path.lexists(tmp_path / "out" / "final")


def test_what_is_left_counts_an_evaluation_s_batches(run_config, tmp_path, monkeypatch):
    class Told(Exception):
        pass

    def time_left(config, batches, step):
        raise Told(batches, step)

    monkeypatch.setattr("telechat.training.run.TimeLeft", time_left)
    for output, held_out in (("with", True), ("without", False)):
        run = TrainingRun(dataclasses.replace(run_config, output_dir=str(tmp_path / output)))
        run.evaluation = run.dataset if held_out else None
        with pytest.raises(Told) as told:
            run.run()
        assert told.value.args == (math.ceil(run.dataset.num_packs / 2) if held_out else 0, 0)


@pytest.mark.parametrize("settings, count", [({"save_steps": 1, "total_steps": 9}, 3), ({"save_steps": 5, "total_steps": 9}, 2),
                                             ({"save_steps": 9, "total_steps": 9}, 1), ({"save_steps": 0}, 1),
                                             ({"save_steps": 1, "total_steps": 9, "keep_checkpoints": 5}, 6)])
def test_one_checkpoint_more_than_stays_is_there_while_the_next_is_written(settings, count):
    assert checkpoints_at_once(RunConfig.from_dict(settings)) == count


def test_a_run_that_does_not_fit_into_memory_is_refused_with_what_helps(run_config, monkeypatch, capsys):
    model = TeleChatConfig.from_pretrained(run_config.load_checkpoint)
    peak = fullest_rank(model, run_config, PackedDataset(run_config.train_dataset, 1).max_length).peak
    monkeypatch.setattr(resources, "available_bytes", lambda: peak)
    assert f"memory      about {peak / 1e9:.2f} GB expected at the peak:" in describe_run(TrainingRun(run_config))
    monkeypatch.setattr(resources, "available_bytes", lambda: peak - 1)
    monkeypatch.setattr(TeleChat, "from_pretrained", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(InputError, match=r"^training needs about 0\.\d+ GB of memory \(framework 0\.65.*\), and 0\.\d+ GB are "
                                         "available: raise micro_batches or lower batch_size and set "
                                         "parallel.recompute=true and preprocess with a smaller --max_length, or give "
                                         "--ignore_memory"):
        TrainingRun(run_config)
    TrainingRun(run_config, ignore_memory=True)
    assert "warning: training needs" in capsys.readouterr().err
    assert not os.path.exists(run_config.output_dir)


def test_a_batch_of_a_billion_is_refused_before_memory_fills(run_config):
    with pytest.raises(InputError, match=r"^training needs about [\d,]{7,}\.\d GB of memory .*lower batch_size"):
        TrainingRun(dataclasses.replace(run_config, batch_size=10 ** 9))


def test_checkpoints_that_do_not_fit_onto_the_disk_are_refused(run_config, monkeypatch):
    size = checkpoint_bytes(TeleChatConfig.from_pretrained(run_config.load_checkpoint), "float32")
    free = [2 * size]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free[0]}))
    TrainingRun(run_config)
    free[0] -= 1
    with pytest.raises(InputError, match=r"^2 checkpoints of 0\.00 GB will take .* GB in .*out, where .* GB are free: free "
                                         "space, lower keep_checkpoints, give another output_dir, or give --ignore_memory"):
        TrainingRun(run_config)


def test_what_rounding_loses_goes_to_the_largest_part_and_trifles_are_left_out():
    parts = {"weights": 1_004_000_000, "work": 1_004_000_001, "framework": 604_000_000, "tables": 5_000_000, "held": 4_999_999}
    memory = types.SimpleNamespace(parts=parts, peak=sum(parts.values()), peak_phase="head")
    assert memory_lines(memory, " of the fullest process") == [
        "memory      about 2.62 GB expected at the peak of the fullest process:",
        "                1.00 GB  weights", "                1.01 GB  work        of what runs then: head",
        "                0.60 GB  framework   MindSpore and its compiler", "                0.01 GB  tables      masks and positions"]


@pytest.mark.parametrize("sequences, packs, text", [(9, 100, "9 of 100 packs, less than an epoch"), (10, 100, "0.1 epochs"),
                                                    (250, 100, "2.5 epochs")])
def test_no_run_is_of_no_epochs(sequences, packs, text):
    assert _epochs(sequences, packs) == text
