"""tools/evaluate.py on small subjects in the published layout, against plain torch with the same weights."""

import json
import math
import random

import numpy as np
import pytest

from telechat import Tokenizer
from telechat.generation import chat
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


@pytest.mark.parametrize("layout, split", [("ceval", "val"), ("mmlu", "test")])
def test_five_shot_scores_equal_torch(checkpoint, torch_model, data, tmp_path, capsys, layout, split):
    root, questions = data
    assert evaluate.main(["--load_checkpoint", str(checkpoint), "--task", layout, "--data", str(root / layout),
                          "--output_dir", str(tmp_path / "out"), "--batch_size", "4"]) == 0
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
    from telechat.evaluation import forward
    from telechat.errors import InputError

    command = ["--load_checkpoint", str(checkpoint), "--task", "mmlu", "--data", str(data[0] / "mmlu"), "--output_dir"]
    evaluate.main([*command, str(tmp_path / "whole")])
    original, calls = forward.Forward.last_logits, []

    def counted(self, sequences):
        calls.append(len(sequences))
        if calls[2:] and not (tmp_path / "broken" / "scores.json").exists() and not resumed:
            raise KeyboardInterrupt
        return original(self, sequences)

    monkeypatch.setattr(forward.Forward, "last_logits", counted)
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
def test_perplexity_equals_torch(checkpoint, torch_model, tmp_path, kind):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    lines = ([{"input": "你好<_bot>您好<_user>再见", "output": "再会，明天见" * number} for number in range(1, 7)]
             if kind == "conversations" else [{"text": "天空为什么是蓝色的" * number} for number in range(1, 7)])
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluate.main(["--load_checkpoint", str(checkpoint), "--task", "jsonl", "--data", str(tmp_path / "lines.jsonl"),
                   "--output_dir", str(tmp_path / "out"), "--batch_size", "4"])
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
