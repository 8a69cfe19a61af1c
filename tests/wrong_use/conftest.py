"""The files that wrong uses name: good ones, torn ones, and none."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest

from telechat import TeleChat, TeleChatConfig
from tests.adapter_files import write_adapter
from tests.conftest import ROOT
from tests.wrong_use.checks import FIELDS

TOKENIZER = ROOT / "samples" / "tokenizer.model"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Names that the table uses in braces → paths."""
    folder = tmp_path_factory.mktemp("wrong")
    made = {name: folder / name for name in ("ckpt", "bare", "data", "empty", "absent", "out", "broken", "torn", "alien", "ceval")}
    TeleChat(TeleChatConfig(**FIELDS)).save_pretrained(made["ckpt"])
    shutil.copytree(made["ckpt"], made["bare"])
    shutil.copy(TOKENIZER, made["ckpt"])
    made["empty"].mkdir()
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
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 7516192768\n"
    for name, files in (("pointer", {"config.json": None, "model.safetensors": pointer}), ("gguf", {"q4.gguf": b"GGUF"}),
                        ("adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""}),
                        ("rundir", {"checkpoint-000100/config.json": None, "run.yaml": b""}),
                        ("llama", {"config.json": b'{"model_type": "llama"}'})):
        made[name] = folder / name
        for file, content in files.items():
            (made[name] / file).parent.mkdir(parents=True, exist_ok=True)
            (made[name] / file).write_bytes(content if content is not None else (made["ckpt"] / "config.json").read_bytes())
    for name, record in (("system", {"instruction": "q", "output": "a", "system": "s"}),
                         ("unknown", {"input": "q", "output": "a", "context": "c"}), ("half", {"messages": []})):
        made[name] = folder / f"{name}.jsonl"
        made[name].write_text("\n" + json.dumps(record))
    config = TeleChatConfig(**FIELDS)
    for name, other, rank, more in (("lora", {}, 2, {}), ("lora_alpha", {}, 2, {"lora_alpha": 0}), ("lora_rank", {}, 2, {"r": 5}),
                                    ("lora_wide", {"hidden_size": 64}, 2, {}), ("lora_deep", {"n_layer": 3}, 2, {})):
        made[name] = write_adapter(folder / name, dataclasses.replace(config, **other), rank, **more)
    made["utf16"], made["twice"] = folder / "utf16.jsonl", folder / "twice.yaml"
    made["utf16"].write_text(good, encoding="utf-16")
    made["twice"].write_text("batch_size: 2\nseed: 1\nbatch_size: 4\n")
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
