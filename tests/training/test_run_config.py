"""The YAML of a run: reading, overriding, refusing."""

import pathlib

import pytest
import yaml

from telechat import InputError
from telechat.training.run_config import RunConfig

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


def load(tmp_path, text, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return RunConfig.load(str(path), overrides)


@pytest.mark.parametrize("name, length, rate", [("7b", 2048, 3e-5), ("12b", 1024, 3e-5), ("52b", 4096, 1e-5)])
def test_shipped_recipes(name, length, rate):
    path = CONFIGS / f"finetune_{name}.yaml"
    config = RunConfig.load(str(path))
    assert len(path.read_text().splitlines()) < 40
    assert (config.sequence_length, config.train.learning_rate, config.train.lr_schedule) == (length, rate, "cosine")
    assert (config.train.betas, config.train.max_grad_norm) == ((0.9, 0.95), 1.0)


def test_demo_is_a_12b_of_a_few_million_parameters():
    import math

    from telechat import TeleChatConfig
    from telechat.checkpoint.layout import parameter_shapes

    path = CONFIGS / "demo.yaml"
    config = RunConfig.load(str(path))
    assert len(path.read_text().splitlines()) < 40
    shapes = parameter_shapes(TeleChatConfig.from_dict(config.model))
    assert 2e6 < sum(math.prod(shape) for shape in shapes.values()) < 10e6
    assert "lm_head.weight" in shapes and "transformer.h.0.mlp.down_proj.bias" in shapes


def test_overrides_win_and_are_read_as_yaml(tmp_path):
    config = load(tmp_path, "learning_rate: 1e-4\nbatch_size: 2\n", "learning_rate=3e-5", "betas=[0.8, 0.9]",
                  "model.n_layer=3", "output_dir=elsewhere")
    assert config.train.learning_rate == 3e-5 and config.train.betas == (0.8, 0.9)
    assert config.model == {"n_layer": 3} and config.output_dir == "elsewhere" and config.batch_size == 2


def test_numbers_without_a_dot_are_numbers(tmp_path):
    assert load(tmp_path, "learning_rate: 1e-5").train.learning_rate == 1e-5


def test_what_is_written_reads_back(tmp_path):
    config = load(tmp_path, "batch_size: 4\nmicro_batches: 2\ntotal_steps: 7\nwarmup_ratio: 0.5\n")
    assert load(tmp_path, yaml.safe_dump(config.to_dict())) == config


@pytest.mark.parametrize("text, overrides, words", [
    ("learning_rat: 1", (), ["run.yaml", "learning_rat", "nearest known key is learning_rate"]),
    ("", ("batchsize=2",), ["command line", "batchsize", "batch_size"]),
    ("model: {n_layers: 2}", (), ["model.n_layers", "model.n_layer"]),
    ("batch_size: 0", (), ["batch_size"]), ("batch_size: [1]", (), ["batch_size"]),
    ("learning_rate: fast", (), ["learning_rate", "fast"]),
    ("batch_size: 3\nmicro_batches: 2", (), ["batch_size 3", "micro_batches 2"]),
    ("epochs: 1\ntotal_steps: 2", (), ["epochs or total_steps"]), ("epochs: 0", (), ["epochs"]),
    ("sequence_length: -1", (), ["sequence_length"]), ("output_dir: 3", (), ["output_dir"]),
    ("", ("batch_size",), ["key=value"]), ("- a", (), ["keys and values"]), ("a: [", (), ["run.yaml", "not valid YAML"]),
])
def test_mistakes_are_refused(tmp_path, text, overrides, words):
    with pytest.raises(InputError) as caught:
        load(tmp_path, text, *overrides)
    for word in words:
        assert word in str(caught.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="absent.yaml"):
        RunConfig.load(str(tmp_path / "absent.yaml"))
