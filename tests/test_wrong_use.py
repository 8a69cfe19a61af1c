"""Wrong uses of every tool: one sentence that names what and where, exit status 2, nothing written.

Most go through ``main(argv)`` in this process; a few of each tool through the real command line.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest

from telechat import TeleChat, TeleChatConfig, cli
from telechat.serving import protocol
from telechat.serving.refusal import Refusal
from tests.conftest import ROOT

FIELDS = dict(vocab_size=1664, hidden_size=32, n_layer=2, n_head=4, ffn_hidden_size=48, training_seqlen=160)
TOKENIZER = ROOT / "samples" / "tokenizer.model"


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_tool", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Names that the table uses in braces → paths."""
    folder = tmp_path_factory.mktemp("wrong")
    made = {name: folder / name for name in ("ckpt", "bare", "data", "empty", "absent", "run", "out", "broken", "torn", "alien",
                                             "spent", "ceval")}
    TeleChat(TeleChatConfig(**FIELDS)).save_pretrained(made["ckpt"])
    shutil.copytree(made["ckpt"], made["bare"])
    shutil.copy(TOKENIZER, made["ckpt"])
    for name in ("empty", "spent"):
        made[name].mkdir()
    shutil.copytree(made["ckpt"], made["broken"])
    (made["broken"] / "config.json").write_text("{")
    shutil.copytree(made["ckpt"], made["torn"])
    whole = (made["torn"] / "model.safetensors").read_bytes()
    (made["torn"] / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    shutil.copytree(made["ckpt"], made["alien"])
    (made["alien"] / "tokenizer.model").write_bytes(b"not a tokenizer")
    good = json.dumps({"input": "你好", "output": "您好"}, ensure_ascii=False) + "\n"
    for name, text in (("lines", good * 30), ("nothing", ""), ("text", "hello\n"), ("yaml", "batch_size: 4\ntotal_steps: 2\n"),
                       ("badyaml", "a: [1\n"), ("listyaml", "- 1\n"), ("binary", None)):
        made[name] = folder / f"{name}.jsonl"
        made[name].write_bytes(b"\xff\xfe\x00" if text is None else text.encode())
    (made["ceval"] / "val").mkdir(parents=True)
    (made["ceval"] / "dev").mkdir()
    (made["ceval"] / "val" / "logic_val.csv").write_text("id,question,A,B,C,D,answer\n0,q,a,b,c,d,E\n")
    (made["ceval"] / "val" / "art_val.csv").write_text("id,question,A,B\n0,q,a,b\n")
    made["tok"] = TOKENIZER
    subprocess.run([sys.executable, str(ROOT / "tools/preprocess.py"), "--input_dataset_file", str(made["lines"]),
                    "--output_path", str(made["data"]), "--vocab_file_path", str(TOKENIZER), "--max_length", "40"],
                   check=True, capture_output=True)
    made["folder"] = folder
    return made


def snapshot(folder):
    """Every path below a folder, with sizes and times of its files."""
    return sorted((path, os.stat(path).st_size, os.stat(path).st_mtime_ns) if not os.path.isdir(path) else (path,)
                  for root, names, files in os.walk(folder) for path in (os.path.join(root, name) for name in names + files))


def fill(arguments, places):
    return [argument.format(**places) if "{" in argument else argument for argument in arguments]


def assert_one_sentence(status, stderr, words, places):
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert status == 2, (status, stderr)
    assert len(lines) == 1 and "Traceback" not in stderr, stderr
    for word in fill(words, places):
        assert word in lines[0], (word, lines[0])


def check(tool, arguments, words, places, tmp_path, monkeypatch, capsys):
    """Run a tool's main in an empty directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"tools/{tool}.py"])
    before = snapshot(places["folder"])
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: load(tool).main(fill(arguments, places)))
    assert_one_sentence(ended.value.code, capsys.readouterr().err, words, places)
    assert snapshot(places["folder"]) == before and os.listdir(tmp_path) == [], "something was written"


PREPROCESS = ["--input_dataset_file", "{lines}", "--output_path", "{out}", "--vocab_file_path", "{tok}", "--max_length", "40"]
TRAIN = ["--config", "{yaml}", "--train_dataset", "{data}", "--load_checkpoint", "{ckpt}", "--output_dir", "{out}"]
GENERATE = ["--load_checkpoint", "{ckpt}", "--predict_data", "你好"]
SERVE = ["--load_checkpoint", "{ckpt}", "--port", "0"]
EVALUATE = ["--load_checkpoint", "{ckpt}", "--output_dir", "{out}"]
TO_TORCH = ["ms-to-torch", "--mindspore_path", "{ckpt}", "--torch_path", "{out}"]

USES = [
    # preprocess
    ("preprocess", [], ["--input_dataset_file"]),
    ("preprocess", PREPROCESS[2:], ["--input_dataset_file"]),
    ("preprocess", [*PREPROCESS, "--max_len", "4"], ["--max_len"]),
    ("preprocess", [*PREPROCESS[:-1], "many"], ["--max_length", "many"]),
    ("preprocess", [*PREPROCESS[:-1], "0"], ["max_length", "0"]),
    ("preprocess", [*PREPROCESS[:-1], "-3"], ["max_length", "-3"]),
    ("preprocess", [*PREPROCESS, "--overlong", "wrap"], ["--overlong", "wrap"]),
    ("preprocess", [*PREPROCESS, "--eval_share", "1.5"], ["eval_share", "1.5"]),
    ("preprocess", [*PREPROCESS, "--eval_share", "-0.1"], ["eval_share"]),
    ("preprocess", [*PREPROCESS, "--eval_share", "half"], ["--eval_share", "half"]),
    ("preprocess", [*PREPROCESS, "--seed", "x"], ["--seed"]),
    ("preprocess", [*PREPROCESS, "--workers", "0"], ["workers"]),
    ("preprocess", [*PREPROCESS, "--user_token", "<nobody>"], ["--user_token", "<nobody>"]),
    ("preprocess", [*PREPROCESS, "--end_token", "<_bot>"], ["different"]),
    ("preprocess", ["--input_dataset_file", "{absent}", *PREPROCESS[2:]], ["{absent}"]),
    ("preprocess", ["--input_dataset_file", "{empty}", *PREPROCESS[2:]], ["{empty}"]),
    ("preprocess", ["--input_dataset_file", "{nothing}", *PREPROCESS[2:]], ["{nothing}"]),
    ("preprocess", ["--input_dataset_file", "{text}", *PREPROCESS[2:]], ["{text}", "line 1"]),
    ("preprocess", ["--input_dataset_file", "{binary}", *PREPROCESS[2:]], ["{binary}", "UTF-8"]),
    ("preprocess", ["--input_dataset_file", "{lines}:0", *PREPROCESS[2:]], ["weight", "0"]),
    ("preprocess", ["--input_dataset_file", "{lines}:nan", *PREPROCESS[2:]], ["weight"]),
    ("preprocess", ["--input_dataset_file", "{lines}:much", *PREPROCESS[2:]], ["much"]),
    ("preprocess", ["--input_dataset_file", "{lines}:1e9", *PREPROCESS[2:]], ["weight"]),
    ("preprocess", [*PREPROCESS[:4], "--vocab_file_path", "{absent}"], ["{absent}"]),
    ("preprocess", [*PREPROCESS[:4], "--vocab_file_path", "{empty}"], ["{empty}", "tokenizer"]),
    ("preprocess", [*PREPROCESS[:4], "--vocab_file_path", "{text}"], ["{text}"]),
    ("preprocess", [*PREPROCESS[:2], "--output_path", "{text}", *PREPROCESS[4:]], ["{text}"]),
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
    # generate
    ("generate", [], ["--load_checkpoint"]),
    ("generate", [*GENERATE, "--temp", "1"], ["--temp"]),
    ("generate", [*GENERATE, "--temperature", "hot"], ["--temperature", "hot"]),
    ("generate", [*GENERATE, "--temperature", "-1"], ["temperature"]),
    ("generate", [*GENERATE, "--temperature", "nan"], ["temperature"]),
    ("generate", [*GENERATE, "--top_p", "0"], ["top_p"]),
    ("generate", [*GENERATE, "--top_p", "1.1"], ["top_p"]),
    ("generate", [*GENERATE, "--top_k", "-1"], ["top_k"]),
    ("generate", [*GENERATE, "--top_k", "1.5"], ["--top_k"]),
    ("generate", [*GENERATE, "--repetition_penalty", "0"], ["repetition_penalty"]),
    ("generate", [*GENERATE, "--max_new_tokens", "0"], ["max_new_tokens"]),
    ("generate", [*GENERATE, "--max_length", "-5"], ["max_length"]),
    ("generate", [*GENERATE, "--max_length", "2"], ["max_length 2"]),
    ("generate", [*GENERATE, "--seed", "-1"], ["seed"]),
    ("generate", [*GENERATE, "--dtype", "int8"], ["--dtype", "int8"]),
    ("generate", [*GENERATE, "--batch_size", "x"], ["--batch_size"]),
    ("generate", [*GENERATE, "--independent"], ["--independent"]),
    ("generate", [*GENERATE, "--input_file", "{lines}"], ["--predict_data", "--input_file"]),
    ("generate", [*GENERATE[:3], ""], ["empty"]),
    ("generate", [*GENERATE[:2], "--input_file", "{absent}"], ["{absent}"]),
    ("generate", [*GENERATE[:2], "--input_file", "{text}"], ["{text}", "line 1"]),
    ("generate", [*GENERATE[:2], "--input_file", "{nothing}"], ["{nothing}"]),
    ("generate", [*GENERATE[:2], "--input_file", "{lines}", "--independent", "--batch_size", "0"], ["batch_size"]),
    *[(tool, [flag, "{" + name + "}", *rest], ["{" + name + "}"])
      for tool, flag, rest in (("generate", "--load_checkpoint", GENERATE[2:]), ("serve", "--load_checkpoint", SERVE[2:]),
                               ("evaluate", "--load_checkpoint", [*EVALUATE[2:], "--task", "jsonl", "--data", "{lines}"]))
      for name in ("absent", "empty", "broken", "bare", "torn", "alien", "text")],
    # serve
    ("serve", [], ["--load_checkpoint"]),
    ("serve", [*SERVE, "--max_batch", "0"], ["--max_batch", "0"]),
    ("serve", [*SERVE, "--max_batch", "x"], ["--max_batch", "x"]),
    ("serve", [*SERVE, "--max_length", "4"], ["--max_length", "4"]),
    ("serve", [*SERVE, "--max_queue", "-1"], ["--max_queue"]),
    ("serve", [*SERVE, "--port", "-1"], ["--port"]),
    ("serve", [*SERVE, "--port", "70000"], ["--port", "70000"]),
    ("serve", [*SERVE, "--time_limit", "0"], ["--time_limit"]),
    ("serve", [*SERVE, "--time_limit", "nan"], ["--time_limit"]),
    ("serve", [*SERVE, "--api_key", ""], ["--api_key"]),
    ("serve", [*SERVE, "--api_key", "密"], ["--api_key"]),
    ("serve", [*SERVE, "--system", "ignore"], ["--system", "ignore"]),
    ("serve", [*SERVE, "--host", "no.such.host.invalid"], ["--host no.such.host.invalid"]),
    ("serve", [*SERVE, "--host", "192.0.2.1"], ["--host 192.0.2.1"]),
    ("serve", [*SERVE, "--dtype", "int4"], ["--dtype"]),
    ("serve", [*SERVE, "--max_batch", "1000000000"], ["--max_batch 1000000000", "key-value cache"]),
    # evaluate
    ("evaluate", [], ["--load_checkpoint"]),
    ("evaluate", [*EVALUATE, "--task", "gsm8k", "--data", "{empty}"], ["--task", "gsm8k"]),
    ("evaluate", [*EVALUATE, "--task", "ceval"], ["--data"]),
    ("evaluate", [*EVALUATE, "--task", "ceval", "--data", "{absent}"], ["{absent}"]),
    ("evaluate", [*EVALUATE, "--task", "mmlu", "--data", "{empty}"], ["{empty}"]),
    ("evaluate", [*EVALUATE, "--task", "mmlu", "--data", "{ceval}"], ["{ceval}"]),
    ("evaluate", [*EVALUATE, "--task", "ceval", "--data", "{ceval}"], ["art_val.csv", "C, D"]),
    ("evaluate", [*EVALUATE, "--task", "ceval", "--data", "{ceval}", "--split", "train"], ["--split"]),
    ("evaluate", [*EVALUATE, "--task", "ceval", "--data", "{ceval}", "--shots", "-1"], ["--shots"]),
    ("evaluate", [*EVALUATE, "--task", "jsonl", "--data", "{lines}", "--batch_size", "0"], ["--batch_size"]),
    ("evaluate", [*EVALUATE, "--task", "jsonl", "--data", "{empty}"], ["{empty}"]),
    # inspect
    ("inspect", [], ["directory"]),
    ("inspect", ["{absent}"], ["{absent}"]),
    ("inspect", ["{empty}"], ["{empty}"]),
    ("inspect", ["{text}"], ["{text}"]),
    ("inspect", ["{broken}"], ["{broken}"]),
    ("inspect", ["{torn}"], ["{torn}"]),
    ("inspect", ["{data}", "--samples", "-1"], ["--samples"]),
    ("inspect", ["{data}", "--tokenizer", "{absent}"], ["{absent}"]),
    ("inspect", ["{data}", "--color", "blue"], ["--color"]),
    # convert
    ("convert", [], ["COMMAND"]),
    ("convert", ["ms-to-onnx"], ["ms-to-onnx"]),
    ("convert", TO_TORCH[:3], ["--torch_path"]),
    ("convert", [*TO_TORCH, "--format", "onnx"], ["--format", "onnx"]),
    ("convert", [*TO_TORCH, "--dtype", "int8"], ["--dtype", "int8"]),
    ("convert", ["ms-to-torch", "--mindspore_path", "{absent}", "--torch_path", "{out}"], ["{absent}"]),
    ("convert", ["ms-to-torch", "--mindspore_path", "{empty}", "--torch_path", "{out}"], ["{empty}"]),
    ("convert", ["ms-to-torch", "--mindspore_path", "{torn}", "--torch_path", "{out}"], ["{torn}"]),
    ("convert", ["ms-to-torch", "--mindspore_path", "{broken}", "--torch_path", "{out}"], ["{broken}"]),
    ("convert", ["torch-to-ms", "--torch_path", "{absent}", "--mindspore_path", "{out}"], ["{absent}"]),
    ("convert", ["torch-to-ms", "--torch_path", "{empty}", "--mindspore_path", "{out}"], ["{empty}"]),
    ("convert", ["torch-to-ms", "--torch_path", "{empty}", "--mindspore_path", "{out}", "--model_name", "gpt"], ["gpt"]),
    ("convert", ["mindformers-to-ms", "--checkpoint", "{absent}", "--config", "{ckpt}/config.json", "--mindspore_path",
                 "{out}"], ["{absent}"]),
    ("convert", ["mindformers-to-ms", "--checkpoint", "{text}", "--config", "{ckpt}/config.json", "--mindspore_path",
                 "{out}"], ["{text}"]),
    ("convert", ["mindformers-to-ms", "--checkpoint", "{text}", "--config", "{absent}", "--mindspore_path", "{out}"],
     ["{absent}"]),
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


@pytest.mark.parametrize("tool, arguments, words", USES,
                         ids=[f"{number}-{tool}" for number, (tool, _, _) in enumerate(USES)])
def test_wrong_uses(tool, arguments, words, places, tmp_path, monkeypatch, capsys):
    check(tool, arguments, words, places, tmp_path, monkeypatch, capsys)


def chat(**fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}


def said(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


REQUESTS = [
    ({"model": None}, "model"), ({"model": 3}, "model"), ({"model": "gpt"}, "model"), ({"messages": None}, "messages"),
    ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0]"), ({"messages": [{"role": "user"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages[0]"),
    (said("assistant"), "messages"), (said("user", "assistant"), "messages"), (said("assistant", "user"), "messages"),
    (said("system", "user"), "messages[0]"), (said("developer", "user"), "messages[0]"), (said("tool"), "messages[0]"),
    (said(7), "messages[0]"), (said("system"), "messages[0]"), ({"temperature": -1}, "temperature"),
    ({"temperature": 3}, "temperature"), ({"temperature": "1"}, "temperature"), ({"temperature": True}, "temperature"),
    ({"temperature": [1]}, "temperature"), ({"top_p": 1.1}, "top_p"), ({"top_p": -0.1}, "top_p"), ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"), ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"), ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 129}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": "9"}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"), ({"max_tokens": 128}, "messages"),
    ({"messages": [{"role": "user", "content": "话" * 500}]}, "messages"), ({"n": 0}, "n"), ({"n": 17}, "n"),
    ({"n": 1.0}, "n"), ({"seed": 1.5}, "seed"), ({"seed": 1 << 65}, "seed"), ({"stop": 3}, "stop"), ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 5}, "stop"), ({"stop": ["a", 1]}, "stop"), ({"stop": "x" * 257}, "stop"), ({"stream": 1}, "stream"),
    ({"stream_options": 1}, "stream_options"), ({"stream_options": {"include_usage": 1}}, "stream_options"),
    ({"drop_oldest": "yes"}, "drop_oldest"), ({"logprobs": True}, "logprobs"), ({"top_logprobs": 3}, "top_logprobs"),
    ({"logit_bias": {"5": 1}}, "logit_bias"), ({"tools": [{}]}, "tools"), ({"functions": [1]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"), ({"modalities": ["audio"]}, "modalities"),
    ({"temprature": 1}, "temprature"), ({"x" * 100: 1}, "x" * 60),
]


@pytest.fixture(scope="module")
def model(places):
    from telechat.generation.settings import GenerationSettings

    config = TeleChatConfig.from_pretrained(places["ckpt"])
    return protocol.Model("tiny", GenerationSettings.load(places["ckpt"], config), 128, config.vocab_size)


@pytest.mark.parametrize("fields, param", REQUESTS, ids=range(len(REQUESTS)))
def test_wrong_requests(fields, param, model):
    with pytest.raises(Refusal) as refused:
        protocol.read_chat(chat(**fields), model)
    assert refused.value.status == (404 if fields == {"model": "gpt"} else 400)
    assert refused.value.param == param
    assert param.split("[")[0] in refused.value.message and "\n" not in refused.value.message
    assert len(refused.value.message) < 300


@pytest.mark.parametrize("prompt", [None, 3, [], "", [[]], ["a", 3], [1664], [-1], [True], {"a": 1}, ["a"] * 17, "话" * 500])
def test_wrong_prompts(prompt, model):
    with pytest.raises(Refusal) as refused:
        protocol.read_completion({"model": "tiny", "prompt": prompt}, model)
    assert refused.value.status == 400 and refused.value.param == "prompt" and "prompt" in refused.value.message \
        or "token id" in refused.value.message


def test_a_system_message_may_be_put_before_the_question(model):
    import dataclasses

    prepending = dataclasses.replace(model, system="prepend")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    asked = protocol.read_chat({"model": "tiny", "messages": messages}, prepending).prompts
    assert asked == protocol.read_chat(chat(messages=[{"role": "user", "content": "be brief\nhi"}]), model).prompts
    with pytest.raises(Refusal, match="first"):
        protocol.read_chat({"model": "tiny", "messages": [messages[1], messages[0], messages[1]]}, prepending)


def test_there_are_two_hundred_wrong_uses():
    assert len(USES) + len(REQUESTS) >= 200


# The real command line: the first wrong flag and the first wrong file of each tool.
REAL = [next(use for use in USES if use[0] == tool and ("{absent}" in use[1]) == missing)
        for tool in dict.fromkeys(tool for tool, _, _ in USES) for missing in (False, True)
        if any(use[0] == tool and ("{absent}" in use[1]) == missing for use in USES)]


@pytest.mark.parametrize("tool, arguments, words", REAL, ids=[f"{number}-{use[0]}" for number, use in enumerate(REAL)])
def test_through_the_real_command_line(tool, arguments, words, places, tmp_path):
    before = snapshot(places["folder"])
    result = subprocess.run([sys.executable, str(ROOT / "tools" / f"{tool}.py"), *fill(arguments, places)], cwd=tmp_path,
                            capture_output=True, text=True, timeout=120)
    assert_one_sentence(result.returncode, result.stderr, words, places)
    assert snapshot(places["folder"]) == before and os.listdir(tmp_path) == []


def test_an_unexpected_failure_is_one_line_and_a_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["tools/train.py", "--config", "x"])
    monkeypatch.delenv("RANK_ID", raising=False)

    def main():
        raise RuntimeError("the first line\nand more")

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.count("\n") == 1
    saved, = tmp_path.iterdir()
    assert error == f"error: unexpected RuntimeError: the first line (details: {saved})\n"
    text = saved.read_text()
    assert text.startswith("tools/train.py --config x\n") and "Traceback" in text and "and more" in text
    # A process under msrun has a log, which its stderr goes to.
    monkeypatch.setenv("RANK_ID", "1")
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    *traceback, line = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and line == "error: unexpected RuntimeError: the first line (details: above)"
    assert traceback[0].startswith("Traceback") and traceback[-1] == "and more" and list(tmp_path.iterdir()) == [saved]
