"""tools/evaluate.py on small subjects in the published layout, against plain torch with the same weights."""

import contextlib
import json
import math
import random

import numpy as np
import pytest

from telechat import TeleChatConfig, Tokenizer
from telechat.generation import chat
from telechat.generation.memory import cache_bytes
from tests.conftest import load_tool, save_small_model

torch = pytest.importorskip("torch")
evaluate = load_tool("evaluate")

FIELDS = dict(vocab_size=1664, hidden_size=32, n_layer=2, n_head=4, ffn_hidden_size=48, training_seqlen=768,
              initializer_range=0.3, tie_word_embeddings=False)
SUBJECTS = {"logic": "逻辑学", "high_school_physics": "高中物理"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluation") / "tiny"
    save_small_model(directory, **FIELDS)
    return directory


@pytest.fixture(scope="module")
def torch_model(checkpoint):
    from safetensors.torch import load_file

    from tests.torch_reference import TorchTeleChat

    config = json.loads((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    return TorchTeleChat(config, tensors)


def question(rng, number):
    return [f"第{number}题：{rng.randint(1, 99)} + {rng.randint(1, 99)}", *(f"{letter}{rng.randint(1, 99)}" for letter in "wxyz"),
            rng.choice("ABCD")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Both layouts, and the questions by (layout, split, subject)."""
    import csv

    rng, root, questions = random.Random(5), tmp_path_factory.mktemp("data"), {}
    for layout in ("ceval", "mmlu"):
        for split, count in (("dev", 5), ("val", 9), ("test", 7)):
            (root / layout / split).mkdir(parents=True)
            for subject in SUBJECTS:
                rows = questions[layout, split, subject] = [question(rng, number) for number in range(count)]
                with open(root / layout / split / f"{subject}_{split}.csv", "w", encoding="utf-8", newline="") as file:
                    writer = csv.writer(file)
                    if layout == "mmlu":
                        writer.writerows(rows)
                        continue
                    writer.writerow(["id", "question", "A", "B", "C", "D", *(["answer"] if split != "test" else [])])
                    writer.writerows([number, *(row if split != "test" else row[:-1])] for number, row in enumerate(rows))
    return root, questions


def message(layout, subject, row):
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row[1:5]))
    if layout == "ceval":
        return f"以下是中国关于{SUBJECTS[subject]}考试的单项选择题，请选出其中的正确答案。\n\n{row[0]}\n{choices}\n答案："
    return (f"There is a single choice question about {subject} . Answer the question by replying "
            f"A, B, C or D.\nQuestion: {row[0]}\n{choices}\nAnswer: ")


def torch_answers(torch_model, checkpoint, layout, subject, examples, rows):
    """The next-token logits of A, B, C, D and the likeliest letters, one question at a time."""
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    letters = [tokenizer.encode(letter)[0] for letter in "ABCD"]
    history = [part for row in examples for part in ({"role": "user", "content": message(layout, subject, row)},
                                                     {"role": "bot", "content": row[5]})]
    scores = []
    for row in rows:
        prompt = chat.build_prompt(tokenizer, history, message(layout, subject, row), 10**6, honour_leading_marker=False)
        assert len(prompt) <= FIELDS["training_seqlen"]
        logits = torch_model(torch.tensor([prompt]))[0, -1]
        scores.append(logits[letters].tolist())
    return scores, ["ABCD"[int(np.argmax(score))] for score in scores]


@pytest.mark.parametrize("layout, split, small", [("ceval", "val", False), ("mmlu", "test", True)])
def test_five_shot_scores_equal_torch(checkpoint, torch_model, data, tmp_path, capsys, layout, split, small):
    """small: on a cache of one of the longest prompts."""
    root, questions = data
    token = cache_bytes(TeleChatConfig.from_pretrained(checkpoint), 1, 1, 4)
    given = ["--cache_memory", f"{FIELDS['training_seqlen'] * token / 1e6:.6f}MB"] if small else []
    assert evaluate.main(["--load_checkpoint", str(checkpoint), "--task", layout, "--data", str(root / layout),
                          "--output_dir", str(tmp_path / "out"), "--batch_size", "4", *given]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))
    lines = (tmp_path / "out" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    records = {record["key"]: record for record in map(json.loads, lines)}
    accuracies, right, asked = [], 0, 0
    for subject in SUBJECTS:
        rows = questions[layout, split, subject]
        logits, answers = torch_answers(torch_model, checkpoint, layout, subject, questions[layout, "dev", subject], rows)
        found = [records[f"{subject}/{number}"] for number in range(len(rows))]
        assert np.abs(np.array([record["logits"] for record in found]) - logits).max() < 1e-3
        assert [(record["answer"], record["correct"]) for record in found] == list(zip(answers, (row[5] for row in rows)))
        correct = sum(answer == row[5] for answer, row in zip(answers, rows))
        assert scores["subjects"][subject] == {"questions": len(rows), "correct": correct, "accuracy": correct / len(rows)}
        accuracies.append(correct / len(rows))
        right, asked = right + correct, asked + len(rows)
    assert scores["accuracy"] == pytest.approx(np.mean(accuracies))
    assert scores["accuracy_of_questions"] == pytest.approx(right / asked)
    assert f"{np.mean(accuracies):7.1%}" in capsys.readouterr().out


def test_ceval_test_files_tell_no_answers_and_give_a_submission(checkpoint, torch_model, data, tmp_path):
    root, questions = data
    evaluate.main(["--load_checkpoint", str(checkpoint), "--task", "ceval", "--data", str(root / "ceval"), "--split", "test",
                   "--output_dir", str(tmp_path), "--shots", "0"])
    rows = questions["ceval", "test", "logic"]
    _, expected = torch_answers(torch_model, checkpoint, "ceval", "logic", [], rows)
    submission = json.loads((tmp_path / "submission.json").read_text())
    assert submission["logic"] == {str(number): answer for number, answer in enumerate(expected)}


def test_an_evaluation_goes_on_where_it_was_broken_off(checkpoint, data, tmp_path, monkeypatch):
    from telechat.errors import InputError
    from telechat.evaluation import prompts

    command = ["--load_checkpoint", str(checkpoint), "--task", "mmlu", "--data", str(data[0] / "mmlu"), "--output_dir"]
    evaluate.main([*command, str(tmp_path / "whole")])
    original, calls = prompts.PromptLogits.__call__, []

    def counted(self, sequences):
        calls.append(len(sequences))
        if calls[2:] and not (tmp_path / "broken" / "scores.json").exists() and not resumed:
            raise KeyboardInterrupt
        return original(self, sequences)

    monkeypatch.setattr(prompts.PromptLogits, "__call__", counted)
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        evaluate.main([*command, str(tmp_path / "broken")])
    with open(tmp_path / "broken" / "answers.jsonl", "a") as file:
        file.write('{"key": "logic/5", "ans')  # a crash in the middle of a line
    resumed, before = True, len(calls)
    evaluate.main([*command, str(tmp_path / "broken")])
    assert sum(calls[before:]) == 14 - sum(calls[:2])
    whole, broken = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("whole", "broken"))
    assert whole == broken
    with pytest.raises(InputError, match="another shots"):
        evaluate.main([*command, str(tmp_path / "broken"), "--shots", "3"])


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
    import shutil

    from safetensors.numpy import load_file, save_file

    from telechat.errors import InputError

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
    import shutil

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
    from telechat.errors import InputError

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

    settings = GenerationSettings.load(checkpoint, read_config(checkpoint))
    texts = ["<_user>天<_bot><_end>", "</s><_pad> x"]
    (tmp_path / "t.jsonl").write_text(first + "\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    sequences = read_sequences(tmp_path / "t.jsonl", settings, 768)
    assert [ids for ids, _ in sequences.pairs] == [settings.tokenizer.encode(text, control_tokens=False) for text in texts]
    assert not any(set(ids) & settings.tokenizer.control_ids for ids, _ in sequences.pairs)
    (tmp_path / "c.jsonl").write_text(first + json.dumps({"input": "<_user>a <_end>", "output": "<_bot>b"}))
    (ids, _), = read_sequences(tmp_path / "c.jsonl", settings, 768).pairs
    assert [index for index in ids if index in settings.tokenizer.control_ids] == [20, 21, 2]


def read_config(directory):
    from telechat import TeleChatConfig

    return TeleChatConfig.from_pretrained(directory)


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


def test_prompts_of_choices_keep_to_the_length_of_the_model(checkpoint, data, tmp_path, monkeypatch):
    """Five examples do not fit into 400 tokens: the oldest go; and control tokens in a question are text."""
    import shutil

    from telechat.evaluation import multiple_choice
    from telechat.evaluation.prompts import PromptLogits
    from telechat.generation.settings import GenerationSettings

    short = tmp_path / "short"
    shutil.copytree(checkpoint, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "training_seqlen": 400}))
    seen = []
    monkeypatch.setattr(PromptLogits, "__call__", lambda self, prompts: seen.extend(prompts) or np.zeros(
        (len(prompts), FIELDS["vocab_size"]), np.float32))
    evaluate.main(["--load_checkpoint", str(short), "--task", "mmlu", "--data", str(data[0] / "mmlu"), "--output_dir",
                   str(tmp_path / "out")])
    shots = [prompt.count(20) - 1 for prompt in seen]
    assert len(seen) == 14 and max(map(len, seen)) <= 400 and {prompt[0] for prompt in seen} == {20}
    assert 0 < min(shots) and max(shots) < 5
    settings = GenerationSettings.load(short, read_config(short))
    asked = multiple_choice.Question("0", "<_user>x<_bot>", ("<_end>", "b", "c", "d"), "A")
    prompt, = multiple_choice.build_prompts(multiple_choice.BENCHMARKS["mmlu"], settings, "logic", [], [asked], 400)
    assert [index for index in prompt if index in settings.tokenizer.control_ids] == [20, 21]
