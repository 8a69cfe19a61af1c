"""tools/convert.py as people call it."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="conversion needs torch: install the extra `convert`")

TOOL = pathlib.Path(__file__).resolve().parents[2] / "tools/convert.py"


def run(directory, *arguments):
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], cwd=directory,
                          capture_output=True, text=True)


def last_line(result):
    """The error, which must be the one line after what tqdm shows, with exit status 2 and no traceback."""
    assert result.returncode == 2 and "Traceback" not in result.stderr and result.stdout == ""
    return result.stderr.strip().split("\n")[-1]


def test_there_and_back(shared, tmp_path):
    import torch
    source = tmp_path / "official"
    source.mkdir()
    for path in (shared / "reference/telechat_52b_tiny").iterdir():
        shutil.copy(path, source)
    (source / "tokenizer.model").write_text("tokens")
    result = run(tmp_path, "torch-to-ms", "--torch_path", source, "--mindspore_path", "ms",
                 "--dtype", "float16", "--model_name", "telechat_52b")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "wrote 0.4 MB of weights to ms",
        "next: python tools/generate.py --load_checkpoint ms"]
    assert "2/2" in result.stderr  # tqdm over the two shards
    result = run(tmp_path, "ms-to-torch", "--mindspore_path", "ms", "--torch_path", "back")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "wrote 0.4 MB of weights to back"
    assert 'transformers.AutoModelForCausalLM.from_pretrained("back"' in result.stdout
    back = torch.load(tmp_path / "back/pytorch_model-00001-of-00001.bin", weights_only=True)
    index = json.loads((source / "pytorch_model.bin.index.json").read_text())
    assert set(back) == set(index["weight_map"])
    for name, file in index["weight_map"].items():
        original = torch.load(source / file, weights_only=True)[name]
        assert torch.equal(back[name], original.to(torch.float16))
    result = run(tmp_path, "ms-to-torch", "--mindspore_path", "ms", "--torch_path", "safe",
                 "--format", "safetensors")
    assert result.returncode == 0
    assert sorted(os.listdir(tmp_path / "safe")) == ["config.json", "model.safetensors", "tokenizer.model"]


def test_mindformers(shared, tmp_path):
    import mindspore
    import torch
    source = shared / "reference/telechat_7b_tiny"
    names = {"word_embeddings.weight": "model.tok_embeddings.embedding_weight",
             "ln_f.weight": "model.norm_out.weight"}
    parts = {"input_layernorm": "attention_norm", "self_attention.query": "attention.wq",
             "self_attention.key_value": "attention.wk_v", "self_attention.dense": "attention.wo",
             "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1",
             "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2", "h.": "model.layers."}
    entries = []
    for file in sorted(source.glob("*.bin")):
        for name, tensor in torch.load(file, weights_only=True).items():
            theirs = names.get(name, name)
            for one, other in parts.items() if theirs == name else ():
                theirs = theirs.replace(one, other)
            entries.append({"name": theirs, "data": mindspore.Tensor(tensor.numpy())})
    mindspore.save_checkpoint(entries, str(tmp_path / "m.ckpt"))
    result = run(tmp_path, "mindformers-to-ms", "--checkpoint", "m.ckpt", "--config", source / "config.json",
                 "--mindspore_path", "ms", "--mp", "2")
    assert result.returncode == 0, result.stderr
    # There was no tokenizer to take along.
    assert "next: copy the published tokenizer.model or tokenizer.json to ms, then: python " in result.stdout
    assert run(tmp_path, "torch-to-ms", "--torch_path", source, "--mindspore_path", "other").returncode == 0
    from safetensors.torch import load_file
    one, other = load_file(tmp_path / "ms/model.safetensors"), load_file(tmp_path / "other/model.safetensors")
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("arguments, message", [
    (["torch-to-ms", "--torch_path", "nowhere", "--mindspore_path", "ms"],
     "error: nowhere is not a directory; give the one that holds config.json and the weights"),
    (["ms-to-torch", "--mindspore_path", "nowhere", "--torch_path", "back"],
     "error: nowhere is not a directory"),
    (["mindformers-to-ms", "--checkpoint", "nothing.ckpt", "--config", "nothing.json",
      "--mindspore_path", "ms"], "error: nothing.json cannot be read"),
    (["torch-to-ms", "--torch_path", "."], "the following arguments are required: --mindspore_path"),
    (["torch-to-ms", "--torch_path", ".", "--mindspore_path", "ms", "--dtype", "int8"],
     "invalid choice: 'int8'"),
    (["torch-to-ms", "--torch", ".", "--mindspore_path", "ms"], "required: --torch_path"),
    ([], "required: COMMAND"),
])
def test_bad_arguments(tmp_path, arguments, message):
    assert message in last_line(run(tmp_path, *arguments))
    assert os.listdir(tmp_path) == []


def test_wrong_model_and_output(shared, tmp_path):
    source = shared / "reference/telechat_12b_tiny"
    result = run(tmp_path, "torch-to-ms", "--torch_path", source, "--mindspore_path", "ms",
                 "--model_name", "telechat_7b")
    assert "is of the layout of telechat_12b, not of telechat_7b" in last_line(result)
    (tmp_path / "file").write_text("")
    result = run(tmp_path, "torch-to-ms", "--torch_path", source, "--mindspore_path", "file")
    assert "file cannot be written" in last_line(result)
    assert os.listdir(tmp_path) == ["file"]
