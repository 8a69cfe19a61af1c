"""tools/inspect.py on datasets and checkpoints; and that its name does not get into anybody's way."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from telechat import InputError, TeleChat, Tokenizer
from tests.conftest import ROOT, load_tool
from tests.test_model import small_config

tool = load_tool("inspect")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inspect")
    (directory / "lines.jsonl").write_text(json.dumps({"input": "你好", "output": "您好！"}, ensure_ascii=False) + "\n",
                                           encoding="utf-8")
    subprocess.run([sys.executable, str(ROOT / "tools" / "preprocess.py"), "--input_dataset_file",
                    str(directory / "lines.jsonl"), "--output_path", str(directory / "data"), "--vocab_file_path",
                    str(ROOT / "samples" / "tokenizer.model"), "--max_length", "20"], check=True, capture_output=True)
    return directory / "data"


def test_a_dataset_with_the_loss_mask_shown(dataset, capsys):
    vocabulary = str(ROOT / "samples" / "tokenizer.model")
    assert tool.main([str(dataset), "--tokenizer", vocabulary, "--color", "never"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tokenizer = Tokenizer.from_pretrained(vocabulary)
    answer = [*tokenizer.encode("您好！"), 2]
    used = 2 + len(tokenizer.encode("你好")) + len(answer)
    assert lines[-1] == f"(filling × {21 - used}) <_user> 你好<_bot>⟦您好！<_end>⟧"
    assert f"1 rows of 1 conversations (0 dropped, 0 cut), {used} tokens, {len(answer)} of them count" in "\n".join(lines)
    tool.main([str(dataset), "--tokenizer", vocabulary, "--color", "always"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("<_bot>\033[32m您好！<_end>\033[0m")
    tool.main([str(dataset), "--color", "always"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("<_bot>\033[32m您好！<_end>\033[0m"), "found where it was"


@pytest.mark.parametrize("how", ["gone", "changed", "unknown"])
def test_a_dataset_whose_tokenizer_is_no_longer_there(how, dataset, tmp_path, capsys):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    info = json.loads((copy / "dataset.json").read_text())
    recorded = info["settings"]["tokenizer"]
    if how == "unknown":  # datasets of older versions
        del recorded["path"]
    else:
        recorded["path"] = str(tmp_path / "tokenizer.model")
    if how == "changed":
        shutil.copy(ROOT / "samples" / "tokenizer.model", tmp_path)
        recorded["sha256"] = "0" * 64
    (copy / "dataset.json").write_text(json.dumps(info))
    assert tool.main([str(copy)]) == 0
    output = capsys.readouterr().out
    answer = [*Tokenizer.from_pretrained(ROOT / "samples" / "tokenizer.model").encode("您好！"), 2]
    assert "(give --tokenizer to read the rows as text)" in output
    assert output.splitlines()[-1].endswith("⟦" + " ".join(map(str, answer)) + "⟧")


def test_statistics_of_a_checkpoint(tmp_path, capsys):
    model = TeleChat(small_config())
    model.save_pretrained(tmp_path / "model")
    tool.main([str(tmp_path / "model"), "--statistics"])
    lines = capsys.readouterr().out.splitlines()
    weights = {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}
    assert f"{sum(map(np.size, weights.values())):,} parameters" in lines[1]
    values = np.concatenate([value.ravel() for name, value in weights.items() if name.endswith("query.weight")])
    line = next(line for line in lines if line.startswith("transformer.h.*.self_attention.query.weight"))
    numbers = [float(word) for word in line.split()[-4:]]
    assert np.allclose(numbers, [values.mean(), values.std(), values.min(), values.max()], rtol=6e-3)
    assert line.split()[1] == str(model.config.n_layer)


def test_what_is_neither_is_refused(tmp_path, dataset):
    for directory, words in ((tmp_path, "neither"), (tmp_path / "absent", "not a directory")):
        with pytest.raises(InputError, match=words):
            tool.main([str(directory)])
    shutil.copytree(dataset, tmp_path / "changed")
    file = tmp_path / "changed" / "dataset.json"
    file.write_text(file.read_text().replace('"sources"', '"origins"'))
    with pytest.raises(InputError, match="changed/dataset.json does not describe a dataset; run tools/preprocess.py again"):
        tool.main([str(file.parent)])
    other = tmp_path / "tokenizer.model"
    shutil.copy(ROOT / "samples" / "tokenizer.model", other)
    with open(other, "ab") as file:
        file.write(b"\x00")
    with pytest.raises(InputError):
        tool.main([str(dataset), "--tokenizer", str(other)])


def test_pythons_own_inspect_is_found_from_tools():
    """Python looks beside a script first: what any tool imports as inspect must still be Python's."""
    code = "import sys; sys.path.insert(0, 'tools'); import inspect; print(inspect.signature(inspect.signature))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("(obj, *,"), result.stderr
