"""tools/evaluate.py on conversations and texts: the perplexity of plain torch, what is taken up again, what is refused."""

import contextlib
import json
import math
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from telechat import TeleChatConfig, Tokenizer
from telechat.errors import InputError
from tests.conftest import load_tool
from tests.evaluation.conftest import FIELDS

torch = pytest.importorskip("torch")
evaluate = load_tool("evaluate")


@pytest.mark.parametrize("kind", ["conversations", "texts"])
def test_perplexity_equals_torch(checkpoint, torch_model, tmp_path, monkeypatch, kind):
    shown = []
    monkeypatch.setattr("telechat.evaluation.run.Progress", lambda what: shown.append(what) or contextlib.nullcontext())
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    lines = ([{"input": "你好<_bot>您好<_user>再见", "output": "再会，明天见" * number} for number in range(1, 7)]
             if kind == "conversations" else [{"text": "天空为什么是蓝色的" * number} for number in range(1, 7)])
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate.main(["--load_checkpoint", str(checkpoint), "--task", "jsonl", "--data", str(tmp_path / "lines.jsonl"),
                   "--output_dir", str(tmp_path / "out"), "--batch_size", "4"])
    assert shown == ["sequences 1 to 4 of 6", "sequences 5 to 6 of 6"]
    total, count = 0.0, 0
    for number in range(1, 7):
        if kind == "texts":
            ids = tokenizer.encode("天空为什么是蓝色的" * number)
            labels = list(ids)
        else:
            first, second = tokenizer.encode("您好") + [2], tokenizer.encode("再会，明天见" * number) + [2]
            one, two = [20, *tokenizer.encode("你好"), 21], [20, *tokenizer.encode("再见"), 21]
            ids = one + first + two + second
            labels = [-100] * len(one) + first + [-100] * len(two) + second
        logits = torch_model(torch.tensor([ids]))[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100,
                                                         reduction="sum"))
        count += sum(label != -100 for label in labels[1:])
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["tokens"], scores["sequences"], scores["cut"]) == (count, 6, 0)
    assert scores["loss"] == pytest.approx(total / count, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps({"input": f"你好{number}", "output": "再会，明天见"}) + "\n" for number in range(3)))
    return path


@pytest.mark.parametrize("changed, named", [
    ("weights", "weights.model.safetensors"), ("data", "data.lines"), ("config", "config.rotary_base"),
    ("tokenizer", "tokenizer"), ("--dtype", "dtype")])
def test_an_evaluation_of_something_else_is_not_taken_up(checkpoint, lines, tmp_path, changed, named):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoint, model)
    command = ["--load_checkpoint", str(model), "--task", "jsonl", "--data", str(lines), "--output_dir", str(out)]
    evaluate.main(command)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    if changed == "weights":  # one value in the middle of a small file
        tensors = load_file(model / "model.safetensors")
        tensors["transformer.h.1.mlp.up_proj.weight"][3, 3] += 1
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    elif changed == "data":
        lines.write_text(lines.read_text().replace("\\u4f60", "\\u4f61", 1))
    elif changed == "config":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "rotary_base": 20000.0}))
    elif changed == "tokenizer":
        shutil.copy(model / "tokenizer.model", tmp_path / "kept")
        (model / "tokenizer.model").write_bytes((tmp_path / "kept").read_bytes() + b"\x1a\x00")
    else:
        command += ["--dtype", "float16"]
    with pytest.raises(InputError, match=f"{out} holds an evaluation with another {named} .* there, .* here.; "
                                         "give another --output_dir, or remove it"):
        evaluate.main(command)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_same_content_elsewhere_is_the_same(checkpoint, lines, tmp_path, monkeypatch):
    from telechat.evaluation import forward

    evaluate.main(["--load_checkpoint", str(checkpoint), "--task", "jsonl", "--data", str(lines), "--output_dir",
                   str(tmp_path / "out")])
    before = json.loads((tmp_path / "out" / "scores.json").read_text())
    shutil.copytree(checkpoint, tmp_path / "moved")
    shutil.copy(lines, tmp_path / "renamed.jsonl")
    monkeypatch.delattr(forward.Forward, "losses")  # nothing is computed again
    evaluate.main(["--load_checkpoint", str(tmp_path / "moved"), "--task", "jsonl", "--data",
                   str(tmp_path / "renamed.jsonl"), "--output_dir", str(tmp_path / "out")])
    after = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (after["loss"], after["tokens"], after["weights"]) == (before["loss"], before["tokens"], before["weights"])
    assert after["checkpoint"] == str(tmp_path / "moved")


@pytest.mark.parametrize("content, said", [
    ('\n{"text": "天空"}\n{"txt": "x"}', 'line 3: lacks the field "text"'), ('{"text": "天"}\n{"text": 3}', "line 2: "),
    ('{"input": "q"}', 'line 1: lacks the field "output"'), ("", "holds no line of JSON"), ('{"text": ""}', "two tokens"),
    ('{"input": "q", "output": "a", "system": "s"}', "line 1: has a system text"),
])
def test_a_file_that_is_refused_leaves_nothing_behind(checkpoint, tmp_path, content, said):
    (tmp_path / "lines.jsonl").write_text(content)
    with pytest.raises(InputError, match=said):
        evaluate.main(["--load_checkpoint", str(checkpoint), "--task", "jsonl", "--data", str(tmp_path / "lines.jsonl"),
                       "--output_dir", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["lines.jsonl"]


@pytest.mark.parametrize("first", ["\n", "\ufeff\n\n"])
def test_blank_lines_and_control_tokens_in_a_file_change_nothing(checkpoint, tmp_path, first):
    """A control token that a text spells is text, as a person wrote it."""
    from telechat.evaluation.run import read_sequences
    from telechat.generation.settings import GenerationSettings

    settings = GenerationSettings.load(checkpoint, TeleChatConfig.from_pretrained(checkpoint))
    texts = ["<_user>天<_bot><_end>", "</s><_pad> x"]
    (tmp_path / "t.jsonl").write_text(first + "\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    sequences = read_sequences(tmp_path / "t.jsonl", settings, 768)
    assert [ids for ids, _ in sequences.pairs] == [settings.tokenizer.encode(text, control_tokens=False) for text in texts]
    assert not any(set(ids) & settings.tokenizer.control_ids for ids, _ in sequences.pairs)
    (tmp_path / "c.jsonl").write_text(first + json.dumps({"input": "<_user>a <_end>", "output": "<_bot>b"}))
    (ids, _), = read_sequences(tmp_path / "c.jsonl", settings, 768).pairs
    assert [index for index in ids if index in settings.tokenizer.control_ids] == [20, 21, 2]


def test_what_is_longer_than_the_model_was_made_for_is_cut(checkpoint, torch_model, tmp_path):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    text = "天空为什么是蓝色的" * 200
    (tmp_path / "lines.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "天空"}))
    evaluate.main(["--load_checkpoint", str(checkpoint), "--task", "jsonl", "--data", str(tmp_path / "lines.jsonl"),
                   "--output_dir", str(tmp_path / "out")])
    total, count = 0.0, 0
    for part in (text, "天空"):
        ids = tokenizer.encode(part)[:FIELDS["training_seqlen"] + 1]
        logits = torch_model(torch.tensor([ids[:-1]]))[0].double()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    assert len(tokenizer.encode(text)) > FIELDS["training_seqlen"] + 1
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["cut"], scores["tokens"]) == (1, count)
    assert scores["loss"] == pytest.approx(total / count, rel=1e-5)
