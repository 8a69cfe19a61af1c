"""tools/evaluate.py on small subjects in the published layout, against plain torch with the same weights."""

import json
import random

import numpy as np
import pytest

from telechat import TeleChatConfig, Tokenizer
from telechat.generation import chat
from telechat.generation.memory import cache_bytes
from tests.conftest import load_tool
from tests.evaluation.conftest import FIELDS

torch = pytest.importorskip("torch")
evaluate = load_tool("evaluate")

SUBJECTS = {"logic": "逻辑学", "high_school_physics": "高中物理"}


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
    settings = GenerationSettings.load(short, TeleChatConfig.from_pretrained(short))
    asked = multiple_choice.Question("0", "<_user>x<_bot>", ("<_end>", "b", "c", "d"), "A")
    prompt, = multiple_choice.build_prompts(multiple_choice.BENCHMARKS["mmlu"], settings, "logic", [], [asked], 400)
    assert [index for index in prompt if index in settings.tokenizer.control_ids] == [20, 21]
