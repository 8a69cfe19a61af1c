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


NUMBERS = ["batch_size", "epochs", "save_steps", "keep_checkpoints", "eval_steps", "max_skipped_steps", "sequence_length",
           "learning_rate", "warmup_steps", "warmup_ratio", "total_steps", "min_learning_rate", "eps", "weight_decay",
           "max_grad_norm", "micro_batches", "seed", "loss_scale", "loss_scale_window", "parallel.tensor",
           "parallel.pipeline", "parallel.data", "parallel.micro_batches"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["true", "false", "yes", "off"])
def test_true_and_false_are_no_numbers(tmp_path, name, value):
    shown = str(value in ("true", "yes"))
    kind = "a whole number|a number"
    with pytest.raises(InputError, match=f"^{name.replace('parallel.micro', 'micro')} must be ({kind}) .*, not {shown}$"):
        load(tmp_path, "", f"{name}={value}")


@pytest.mark.parametrize("text, said", [
    ("betas: [true, 0.9]", "each of betas must be a number at least 0 and below 1, not True"),
    ("betas: [0.9, .nan]", "each of betas must be a number at least 0 and below 1, not nan"),
    ("betas: 0.9", r"betas must be two numbers in \[0, 1\), not 0.9"),
    ("parallel: {pipeline: 2, stages: [true, 3]}", "each of parallel.stages must be a whole number from 1 to .*, not True"),
    ("mask_padding: 1", "mask_padding must be true or false, not 1"),
    ("output_dir: 2024", "output_dir must be a path, not 2024"), ("output_dir:", "output_dir must be a path, not None"),
    ("batch_size: 2024-05-01", "batch_size must be a whole number of at least 1, not '2024-05-01'"),
    ("learning_rate: .inf", "learning_rate must be a number at least 0, not inf"),
    ("seed: 4294967296", "seed must be a whole number from 0 to 4294967295, not 4294967296"),
    ("model: {n_layer: 1}\nmodel: {n_layer: 2}", "run.yaml is not a configuration: line 2: gives the key model twice"),
    ("batch_size: 1\nseed: [", r"run.yaml is not valid YAML \(line 2: expected the node content"),
    ("parallel: 4", "parallel must hold keys such as tensor and pipeline, not 4"),
])
def test_a_wrong_value_is_named_as_it_is(tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        load(tmp_path, text)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
def test_byte_order_marks_and_paths_as_a_shell_has_them(tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/runs")
    (tmp_path / "run.yaml").write_text("output_dir: ~/出\nload_checkpoint: $HOME/model\ntokenizer: $ABSENT/x\n"
                                       "batch_size: 2\n", encoding=encoding)
    config = RunConfig.load(str(tmp_path / "run.yaml"), ["train_dataset=${RUNS}/1"])
    assert (config.output_dir, config.load_checkpoint, config.train_dataset, config.tokenizer, config.batch_size) == \
        ("/home/me/出", "/home/me/model", "/runs/1", "$ABSENT/x", 2)
    (tmp_path / "run.yaml").write_text("batch_size: 2\n", encoding="utf-16")
    with pytest.raises(InputError, match="run.yaml is not UTF-8 but UTF-16; save the file as UTF-8"):
        RunConfig.load(str(tmp_path / "run.yaml"))


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="absent.yaml"):
        RunConfig.load(str(tmp_path / "absent.yaml"))


def test_what_a_run_does_where_nothing_is_said():
    said = {"batch_size": 1, "save_steps": 500, "keep_checkpoints": 2, "eval_steps": 0, "max_skipped_steps": 5}
    assert RunConfig() == RunConfig.from_dict(said)
