"""Wrong uses of the tools that train or plan it: train, estimate, launch, doctor."""

import pytest

from tests.wrong_use.checks import FIELDS, check, numbered

TRAIN = ["--config", "{yaml}", "--train_dataset", "{data}", "--load_checkpoint", "{ckpt}", "--output_dir", "{out}"]
ESTIMATE = ["--config", "{yaml}", "--load_checkpoint", "{ckpt}", "sequence_length=40"]

USES = [
    # train
    ("train", [], ["--config"]),
    ("train", TRAIN[2:], ["--config"]),
    ("train", [*TRAIN, "--resum"], ["--resum"]),
    ("train", ["--config", "{absent}", *TRAIN[2:]], ["{absent}"]),
    ("train", ["--config", "{empty}", *TRAIN[2:]], ["{empty}"]),
    ("train", ["--config", "{badyaml}", *TRAIN[2:]], ["{badyaml}", "line 2"]),
    ("train", ["--config", "{listyaml}", *TRAIN[2:]], ["{listyaml}"]),
    ("train", ["--config", "{binary}", *TRAIN[2:]], ["{binary}"]),
    ("train", [*TRAIN[:2], *TRAIN[4:]], ["train_dataset"]),
    ("train", [*TRAIN[:4], "--output_dir", "{out}"], ["load_checkpoint"]),
    ("train", [*TRAIN, "--resume"], ["--resume", "{out}"]),
    ("train", [*TRAIN, "--train_dataset", "{absent}"], ["{absent}"]),
    ("train", [*TRAIN, "--train_dataset", "{empty}"], ["{empty}"]),
    ("train", [*TRAIN, "--train_dataset", "{ckpt}"], ["{ckpt}"]),
    ("train", [*TRAIN, "--load_checkpoint", "{absent}"], ["{absent}"]),
    ("train", [*TRAIN, "--load_checkpoint", "{empty}"], ["{empty}"]),
    ("train", [*TRAIN, "--load_checkpoint", "{broken}"], ["{broken}", "config.json"]),
    ("train", [*TRAIN, "sequence_length=41"], ["41", "40"]),
    ("train", [*TRAIN, "tokenizer={absent}"], ["{absent}"]),
    ("train", [*TRAIN, "parallel.tensor=2"], ["2"]),
    ("train", [*TRAIN, "parallel.data=3"], ["3"]),
    ("train", [*TRAIN, "epochs=1"], ["epochs", "total_steps"]),
    *[("train", [*TRAIN, override], words) for override, words in [
        ("batch_size", ["key=value"]), ("batch_size=0", ["batch_size", "0"]), ("batch_size=2.5", ["batch_size", "2.5"]),
        ("batch_size=true", ["batch_size"]), ("batch_size=[1", ["batch_size"]), ("batch_size=many", ["batch_size", "many"]),
        ("bach_size=2", ["bach_size", "batch_size"]), ("micro_batches=0", ["micro_batches"]),
        ("micro_batches=3", ["micro_batches", "3"]), ("save_steps=-1", ["save_steps"]), ("save_steps=x", ["save_steps"]),
        ("keep_checkpoints=0", ["keep_checkpoints"]), ("eval_steps=-1", ["eval_steps"]),
        ("max_skipped_steps=0", ["max_skipped_steps"]), ("sequence_length=0", ["sequence_length"]),
        ("sequence_length=1.5", ["sequence_length"]), ("total_steps=0", ["total_steps"]),
        ("total_steps=1.5", ["total_steps"]), ("learning_rate=-1", ["learning_rate"]),
        ("learning_rate=fast", ["learning_rate", "fast"]), ("learning_rate=.inf", ["learning_rate"]),
        ("learning_rate=.nan", ["learning_rate"]), ("min_learning_rate=1", ["min_learning_rate"]),
        ("lr_schedule=step", ["lr_schedule", "step"]), ("warmup_steps=-1", ["warmup_steps"]),
        ("warmup_ratio=2", ["warmup_ratio"]), ("betas=0.9", ["betas"]), ("betas=[0.9]", ["betas"]),
        ("betas=[0.9,1.0]", ["betas"]), ("betas=[a,b]", ["betas"]), ("eps=0", ["eps"]), ("eps=2", ["eps"]),
        ("weight_decay=-0.1", ["weight_decay"]), ("max_grad_norm=-1", ["max_grad_norm"]), ("seed=-1", ["seed"]),
        ("seed=x", ["seed"]), ("dtype=int4", ["dtype", "int4"]), ("dtype=8", ["dtype"]),
        ("mask_padding=1", ["mask_padding"]), ("tokenizer=3", ["tokenizer"]),
        ("model=5", ["model"]), ("model.hiden_size=5", ["model.hiden_size", "model.hidden_size"]),
        ("parallel=4", ["parallel"]), ("parallel.tensor=0", ["parallel.tensor"]), ("parallel.tensr=1", ["tensr", "tensor"]),
        ("parallel.pipeline=x", ["parallel.pipeline"]), ("parallel.data=0", ["parallel.data"]),
        ("parallel.sequence_parallel=2", ["sequence_parallel"]), ("parallel.shard_optimizer=x", ["shard_optimizer"]),
        ("parallel.recompute=3", ["recompute"]), ("parallel.stages=3", ["parallel.stages"]),
        ("parallel.stages=[1,1]", ["parallel.stages"]), ("parallel.stages=[0]", ["parallel.stages"])]],
    *[("train", ["--config", "{yaml}", "--train_dataset", "{data}", "--output_dir", "{out}",
                 *(f"model.{name}={value}" for name, value in {**FIELDS, **fields}.items())], words)
      for fields, words in [
          ({"hidden_size": 0}, ["hidden_size"]), ({"hidden_size": 33}, ["hidden_size 33", "n_head"]),
          ({"n_layer": 0}, ["n_layer"]), ({"n_layer": "two"}, ["n_layer", "two"]), ({"n_head": -1}, ["n_head"]),
          ({"num_key_value_heads": 3}, ["num_key_value_heads 3"]), ({"vocab_size": 1000}, ["1664", "1000"]),
          ({"training_seqlen": 20}, ["40", "20"]), ({"hidden_dropout": 1}, ["hidden_dropout"]),
          ({"attention_dropout": -0.1}, ["attention_dropout"]), ({"layer_norm_epsilon": 0}, ["layer_norm_epsilon"]),
          ({"initializer_range": "x"}, ["initializer_range"]), ({"position_embedding": "learned"}, ["position_embedding"]),
          ({"eos_token_id": "x"}, ["eos_token_id"]), ({"rotary_base": 0}, ["rotary_base"])]],
    # estimate
    ("estimate", [], ["--config"]),
    ("estimate", ["--config", "{absent}"], ["{absent}"]),
    ("estimate", ["--config", "{badyaml}", *ESTIMATE[2:]], ["{badyaml}", "line 2"]),
    ("estimate", [*ESTIMATE[:2], ESTIMATE[-1]], ["--model_config", "--load_checkpoint"]),
    ("estimate", ESTIMATE[:-1], ["{yaml}", "sequence_length"]),
    ("estimate", [*ESTIMATE[:-1], "sequence_length=161"], ["sequence_length 161", "160"]),
    ("estimate", [*ESTIMATE, "--model_config", "{ckpt}/config.json"], ["--model_config"]),
    ("estimate", [*ESTIMATE[:2], "--model_config", "{absent}", ESTIMATE[-1]], ["{absent}"]),
    ("estimate", [*ESTIMATE, "--cards", "0"], ["--cards", "0"]),
    ("estimate", [*ESTIMATE, "--cards", "many"], ["--cards", "many"]),
    ("estimate", [*ESTIMATE, "--card_memory", "64"], ["--card_memory 64", "64GB"]),
    ("estimate", [*ESTIMATE, "--card_tflops", "0"], ["--card_tflops"]),
    ("estimate", [*ESTIMATE, "--efficiency", "1.5"], ["--efficiency", "1.5"]),
    ("estimate", [*ESTIMATE, "--link_gbps", "nan"], ["--link_gbps"]),
    ("estimate", [*ESTIMATE, "--latency_us", "-1"], ["--latency_us", "-1"]),
    ("estimate", [*ESTIMATE, "parallel.tensor=3"], ["tensor", "3"]),
    ("estimate", [*ESTIMATE, "--cards", "2", "--search", "--card_memory", "1MB"], ["2 cards", "0.001 GB"]),
    # doctor
    ("doctor", ["--kernel", "portable"], ["--kernel"]),
    ("doctor", ["--dtype", "int8"], ["--dtype", "int8"]),
    # launch
    ("launch", [], ["-n"]),
    ("launch", ["-n", "0", "{text}"], ["-n", "0"]),
    ("launch", ["-n", "x", "{text}"], ["-n"]),
    ("launch", ["-n", "2", "{absent}"], ["{absent}"]),
    ("launch", ["-n", "3", "--nodes", "2", "{text}"], ["--nodes 2"]),
    ("launch", ["-n", "2", "--nodes", "2", "--node_rank", "2", "{text}"], ["--node_rank 2"]),
    ("launch", ["-n", "2", "--nodes", "2", "{text}"], ["--master"]),
    ("launch", ["-n", "2", "--master", "nowhere", "{text}"], ["--master nowhere"]),
]


@pytest.mark.parametrize("tool, arguments, words", USES, ids=numbered(USES))
def test_wrong_uses(tool, arguments, words, places, tmp_path, monkeypatch, capsys):
    check(tool, arguments, words, places, tmp_path, monkeypatch, capsys)
