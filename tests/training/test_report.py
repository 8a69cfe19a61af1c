"""What a run shows: the line of a step, the summary, report.html, event files and answers."""

import html.parser
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from telechat import Generator, SamplingParams, TeleChat, Tokenizer
from telechat.data import PackedDataset
from telechat.training.html_report import MOST_POINTS, chart, page, thin
from telechat.training.report import Report, step_line
from telechat.training.sample_answers import first_prompts
from telechat.training.trainer import StepResult
from tests.conftest import ROOT, preprocess_samples

VOCABULARY = ROOT / "samples" / "tokenizer.model"


@pytest.mark.parametrize("bar", [False, True])
@pytest.mark.parametrize("number, total, result, speed, left", [
    (1, 9, StepResult(7.4, 1.0, 1e-3, 5), 12.3, 3),
    (320, 320, StepResult(12.34567, 123.4, 2e-3, 5), 1234.5, 61),
    (999_999, 1_000_000, StepResult(12.3456, 123456.7, 1.23e-5, 5), 99_999, 3600 * 99),
    (9_999, 10_000, StepResult(math.nan, math.inf, 1e-5, 5, skipped=True), 9_999_999, 3600 * 99),
])
def test_a_step_stays_within_80_columns(number, total, result, speed, left, bar):
    line = step_line(number, total, result, speed, left, bar)
    assert len(line) <= 80 and f" {number}/{total} " in line
    for word in ("loss", "grad", "tok/s", "left"):
        assert word in line
    assert ("lr" in line) == (total < 10_000), "left out where there is no room"
    assert ("SKIPPED" in line) == result.skipped
    assert "#" not in line or bar


@pytest.mark.parametrize("result", [StepResult(7.4, 1.0, 1e-3, 5), StepResult(12.3456, 123456.7, 1.23e-5, 5),
                                    StepResult(12.3456, 123456.7, 1.23e-5, 5, loss_scale=65536.0, overflows=12),
                                    StepResult(math.nan, math.inf, 1e-5, 5, skipped=True, loss_scale=1.52587890625e-05,
                                               overflows=32)])
@pytest.mark.parametrize("number, total, seconds", [(1, 9, 0.1234), (999, 1000, 1.5), (99_999, 100_000, 123.456)])
def test_a_step_has_its_milliseconds_whatever_else_there_is_to_say(result, number, total, seconds):
    line = step_line(number, total, result, 12345.6, 3600 * 99, seconds=seconds)
    assert len(line) <= 80 and f" 12346 tok/s {seconds * 1000:.0f} ms left 99:00:00" in line, line


def test_a_step_tells_of_overflows():
    result = StepResult(2.5, 1.25, 1e-3, 5, loss_scale=16384.0, overflows=2)
    assert step_line(3, 9, result, 51, 6, seconds=0.25) == \
        "step 3/9 loss 2.5000 grad 1.25 scale 16384 2 overflows 51 tok/s 250 ms left 0:06", "no room for lr"
    assert step_line(3, 99999, result, 512, 6, seconds=0.25) == \
        "step     3/99999 loss 2.5000 grad 1.25 2 overflows 512 tok/s 250 ms left 0:06", "nor for the scale"


def test_the_bar_shows_how_far_the_run_is():
    result = StepResult(1.0, 1.0, 1e-3, 5)
    assert step_line(5, 10, result, 100, 3, bar=True).endswith(" [#####.....]")
    assert step_line(10, 10, result, 100, 3, bar=True).endswith(" [##########]")


def record(step, loss, skipped=False):
    return {"step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": 2.0, "tokens": 640, "seconds": 0.5,
            "skipped": skipped, "time": 1.0}


class Structure(html.parser.HTMLParser):
    """The tags and the text of a page; every tag must be closed."""

    VOID = {"meta", "path", "polyline", "circle"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [value for _, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in self.VOID or self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_everything_and_needs_nothing():
    records = [record(1, 7.0), record(2, math.nan, True), record(3, 5.0), {"step": 3, "evaluation_loss": 5.5},
               record(4, 4.0), {"step": 4, "evaluation_loss": 5.75}]
    answers = [{"step": 2, "question": "<b>?", "answer": "</td><script>"}, {"step": 4, "question": "<b>?", "answer": "yes"}]
    made = Structure(page(records, 10, "lr: 1\nname: <x>\n", answers, True))
    for words in ("step 4 of 10", "2,560 tokens", "evaluation loss 5.7500, best 5.5000 at step 3",
                  "1 steps skipped (the last at 2)", "name: <x>", "<b>?", "</td><script>", "yes", "held out of training"):
        assert words in made.text, words
    assert made.tags.count("svg") == 5 and "script" not in made.tags and "link" not in made.tags and "img" not in made.tags
    assert {"loss: from 7 to 5.75", "skipped steps: from 0 to 1"} <= set(made.attributes)
    assert not any("http" in (value or "") for value in made.attributes)
    assert Structure(page([], 10, "", [], False)).text.count("nothing yet") == 5


def test_a_curve_goes_through_its_points_with_a_gap_where_one_is_not_finite():
    drawing = chart("loss", "", [("training", [(1, 4.0), (2, 3.0), (3, math.inf), (4, 1.0), (5, 2.0)])])
    lines = [[tuple(map(float, point.split(","))) for point in line.split()]
             for line in re.findall(r'polyline points="([^"]+)"', drawing)]
    assert [len(line) for line in lines] == [2, 2]
    (x1, y1), (x2, y2), (x4, y4), (x5, y5) = lines[0] + lines[1]
    assert x2 - x1 == pytest.approx((x5 - x1) / 4, abs=0.2) and x5 - x4 == pytest.approx(x2 - x1, abs=0.2)
    assert (y4 - y2) == pytest.approx(2 * (y2 - y1), abs=0.2) and y1 < y2 < y4, "up is more"
    assert re.findall(r'circle cx="([^"]+)" cy="([^"]+)"', drawing) == [(f"{x:.1f}", f"{y:.1f}") for x, y in lines[0] + lines[1]]
    assert ">training</text>" not in drawing, "one curve needs no name"


@pytest.mark.parametrize("value, shown", [(4.0, ["2", "3", "4", "5", "6"]), (-4.0, ["-6", "-5", "-4", "-3", "-2"]),
                                          (0.0, ["0", "0.25", "0.5", "0.75", "1"])])
def test_a_flat_curve_is_drawn_within_the_frame(value, shown):
    """640 wide, the scale left of 70, the frame 10 from the right and 24 from below: 166 high."""
    drawing = chart("loss", "", [("training", [(1, value), (3, value)]), ("evaluation", [(2, value)])])
    assert re.findall(r'text-anchor="end" dominant-baseline="middle">([^<]+)<', drawing) == shown
    height = 93.0 if value else 176.0
    assert re.findall(r'points="([^"]+)"', drawing) == [f"70.0,{height} 630.0,{height}", f"350.0,{height}"]
    assert re.findall(r'y="(\d+)" text-anchor="end" style="fill:([^"]+)">(\w+)<', drawing) == [
        ("22", "var(--a)", "training"), ("36", "var(--b)", "evaluation")]
    alone = chart("loss", "", [("training", [(5, value)])])
    assert re.findall(r'points="([^"]+)"', alone) == [f"350.0,{height}"], "in the middle"


def test_long_curves_are_thinned_by_means():
    points = [(step, float(step % 2)) for step in range(10 * MOST_POINTS)]
    thinned = thin(points)
    assert len(thinned) == MOST_POINTS and {value for _, value in thinned} == {0.5}
    assert thin(points[:5]) == points[:5] and thin(points[:MOST_POINTS]) == points[:MOST_POINTS]
    assert thin(points)[:2] == [(5, 0.5), (15, 0.5)], "at the middle of its steps"
    groups = thin([(step, math.nan if step < 4 else step) for step in range(3 * MOST_POINTS)])
    assert math.isnan(groups[0][1]) and groups[1] == (4, 4.5), "of what is finite"


def test_the_summary(tmp_path):
    report = Report(str(tmp_path), 3)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5)):
        report.step(step, StepResult(loss, 1.0, 1e-3, 5), 100, 60.0)
        report.evaluation(step, loss + 0.25)
    report.close()
    assert report.summary() == ["tokens:     300 in 3 steps, 3:00 of training",
                                "evaluation: loss 2.7500, best 2.2500 at step 2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run with dropout, with everything on and with everything off."""
    folder = tmp_path_factory.mktemp("report")
    preprocess_samples(folder / "data", "--eval_share", 0.1)
    outputs = {}
    for name, flags in (("with", ["--tensorboard"]), ("without", ["--no-report"])):
        result = subprocess.run(
            [sys.executable, str(ROOT / "tools/train.py"), "--config", str(ROOT / "configs/demo.yaml"), "--train_dataset",
             str(folder / "data"), "--output_dir", str(folder / name), *flags, "model.hidden_size=32", "model.n_layer=2",
             "model.n_head=4", "model.ffn_hidden_size=48", "model.hidden_dropout=0.1", "batch_size=4", "total_steps=4",
             "save_steps=2", "keep_checkpoints=5", f"tokenizer={VOCABULARY}"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        outputs[name] = (folder / name, result.stdout)
    return outputs


def test_a_report_changes_nothing(runs):
    from safetensors.numpy import load_file

    ours, other = (load_file(runs[name][0] / "final" / "model.safetensors") for name in ("with", "without"))
    assert all(np.array_equal(ours[key], other[key]) for key in other)
    assert not (runs["without"][0] / "report.html").exists() and not (runs["without"][0] / "answers.jsonl").exists()


def test_the_answers_are_those_of_each_checkpoint(runs):
    output, _ = runs["with"]
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [answer["step"] for answer in answers] == [2, 2, 2, 4, 4, 4]
    tokenizer = Tokenizer.from_pretrained(VOCABULARY)
    held_out = [answer["question"] for answer in answers[:3]]
    for step in (2, 4):
        generator = Generator(TeleChat.from_pretrained(output / f"checkpoint-{step:06d}"), 576)
        prompts = [[20, *tokenizer.encode(question), 21] for question in held_out]
        expected = generator.generate(prompts, SamplingParams(64, stop_ids=(2,)))
        assert [answer["answer"] for answer in answers if answer["step"] == step] == [
            tokenizer.decode(ids, skip_control_tokens=True) for ids in expected]
    text = Structure((output / "report.html").read_text(encoding="utf-8")).text
    assert all(question in text for question in held_out) and "hidden_dropout: 0.1" in text


def test_event_files_hold_the_metrics(runs):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output, stdout = runs["with"]
    events = loader.EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "learning_rate", "grad_norm", "evaluation_loss"):
        expected = [(record["step"], record[name]) for record in records if name in record]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert np.allclose([value for _, value in found], [value for _, value in expected], rtol=1e-6)
    for words in ("evaluation: loss", "report:     ", "serve.py --load_checkpoint"):
        assert words in stdout


def test_questions_of_a_dataset_whose_conversations_are_kept_apart(tmp_path):
    """Rows then come with a third array; the questions are the same."""
    preprocess_samples(tmp_path / "data")
    prompts = [first_prompts(PackedDataset(tmp_path / "data", 2, segment_ids=segment_ids)) for segment_ids in (False, True)]
    assert prompts[0] == prompts[1] and len(prompts[0]) == 3
