"""tools/preprocess.py from its flags to the dataset, and its one sentence on bad input."""

import hashlib
import itertools
import json
import pathlib
import re
import resource
import runpy
import subprocess
import sys

import numpy as np
import pytest

from telechat.data.packed_dataset import PackedDataset

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "preprocess.py"
SAMPLES = ROOT / "samples"
GOOD = '{"input": "<_user>q", "output": "a"}\n'


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run the tool in this process: function of flags → (exit status, stdout, stderr)."""
    def call(*flags):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, flags)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(TOOL), run_name="__main__")
        return exit_.value.code, *capsys.readouterr()
    return call


def flags(tmp_path, *more, data=SAMPLES / "conversations.jsonl", length=128):
    return ["--input_dataset_file", str(data), "--output_path", str(tmp_path / "out"),
            "--vocab_file_path", str(SAMPLES / "tokenizer.model"), "--max_length", str(length), *more]


def packed_ids(directory):
    data = PackedDataset(directory, 1, shuffle=False)
    return np.concatenate([input_ids for input_ids, _ in itertools.islice(data.batches(), data.num_packs)])


def test_published_examples_become_the_incumbents_packs(shared, tmp_path):
    golden = np.load(shared / "reference" / "packs_12b.npz")
    data = shared / "data"
    done = subprocess.run(
        [sys.executable, str(TOOL), "--input_dataset_file", str(data / "multi_turn_example.jsonl"),
         "--output_path", str(tmp_path / "out"), "--max_length", "1024",
         "--vocab_file_path", str(data / "telechat_12b.tokenizer.model")],
        capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "train: 988 conversations in 703 packs, 516,693 tokens, 480,845 of them learnt, "
        "28.3% padding; 12 dropped as longer than max_length\n")
    data = PackedDataset(tmp_path / "out", batch_size=703, shuffle=False)
    data.check_fits(vocab_size=120000, sequence_length=1024)
    input_ids, labels = next(data.batches())
    count = int(golden["count"])
    assert hashlib.sha256(input_ids[:count].tobytes()).hexdigest() == str(golden["sha256_input_ids"])
    assert hashlib.sha256(labels[:count].tobytes()).hexdigest() == str(golden["sha256_labels"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_52b_starts_each_conversation_and_ends_answers_with_its_end_token(shared, tmp_path, tool):
    data = shared / "data" / "single_turn_example.jsonl"
    vocabulary = shared / "data" / "telechat_52b.tokenizer.model"
    status, _, _ = tool("--input_dataset_file", f"{data}:0.05", "--output_path", tmp_path / "out",
                        "--vocab_file_path", vocabulary, "--max_length", 512)
    assert status == 0
    info = json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))
    assert {role: token["id"] for role, token in info["settings"]["tokens"].items()} == {
        "start": 27, "user": 25, "bot": 26, "end": 2, "pad": 3}
    assert info["settings"]["tokenizer"]["vocab_size"] == 80000
    assert info["train"]["conversations"] + info["train"]["dropped"] == 50
    packs = packed_ids(tmp_path / "out")
    assert 0 not in packs  # the incumbent's end token here is <unk>
    for token in (27, 25, 26, 2):
        assert np.count_nonzero(packs == token) == info["train"]["conversations"]
    firsts = packs[:, :-1][packs[:, 1:] == 25]
    assert (firsts == 27).all()


def test_workers_change_nothing(tmp_path, tool):
    assert tool(*flags(tmp_path / "1", "--workers", "1", "--eval_share", "0.1"))[0] == 0
    assert tool(*flags(tmp_path / "3", "--workers", "3", "--eval_share", "0.1"))[0] == 0
    for name in ("train.mindrecord", "eval.mindrecord", "dataset.json"):
        one, three = (tmp_path / workers / "out" / name for workers in ("1", "3"))
        assert one.read_bytes() == three.read_bytes()


def test_held_out_split_and_weights(tmp_path, tool):
    (tmp_path / "two.jsonl").write_text(GOOD * 2)
    data = SAMPLES / "conversations.jsonl"
    status, output, _ = tool("--input_dataset_file", data, f"{tmp_path / 'two.jsonl'}:3",
                             *flags(tmp_path, "--eval_share", "0.1", length=512)[2:])
    info = json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))
    lines = len(data.read_text(encoding="utf-8").splitlines())
    assert status == 0 and re.search(r"^eval: 7 conversations in \d+ packs", output, re.M)
    assert info["eval"]["conversations"] == 7
    assert lines + 6 - 7 - info["train"]["conversations"] in (0, 2, 4)  # as many of the two as were held out
    assert info["settings"]["sources"] == [{"file": "conversations.jsonl", "weight": 1.0},
                                           {"file": "two.jsonl", "weight": 3.0}]


def test_token_flags_and_truncation(tmp_path, tool):
    status, output, _ = tool(*flags(tmp_path, "--start_token", "<_start>", "--pad_token", "<_unk>",
                                    "--overlong", "truncate", length=64))
    assert status == 0 and "cut to max_length" in output
    packs = packed_ids(tmp_path / "out")
    assert packs.shape[1] == 65 and (packs[:, 0] == 0).all()  # a pack never fills the first position
    info = json.loads((tmp_path / "out" / "dataset.json").read_text(encoding="utf-8"))
    assert np.count_nonzero(packs == 1) == info["train"]["conversations"]


@pytest.mark.parametrize("change, error", [
    (["--input_dataset_file", "{dir}/none.jsonl"], "none.jsonl cannot be read (No such file"),
    (["--input_dataset_file", "{dir}/good.jsonl:0"], "good.jsonl: the weight must be above 0 and at most"),
    (["--input_dataset_file", "{dir}/bad.jsonl"], "bad.jsonl, line 2: is not valid JSON"),
    (["--input_dataset_file", "{dir}/lacks.jsonl"], 'lacks.jsonl, line 2: lacks the field "output"'),
    (["--input_dataset_file", "{dir}/type.jsonl"], 'type.jsonl, line 2: "output" must be a string, not'),
    (["--input_dataset_file", "{dir}/empty.jsonl"], "empty.jsonl holds no line of JSON"),
    (["--vocab_file_path", "{dir}"], "holds neither tokenizer.model nor tokenizer.json"),
    (["--vocab_file_path", "{dir}/good.jsonl"], "good.jsonl is not a whole SentencePiece model"),
    (["--end_token", "</s>"], "--end_token </s>: "),
    (["--max_length", "1"], "max_length must be a whole number from 2 to 1048576, not 1"),
    (["--max_length", "5"], "none of the conversations is short enough for max_length 5"),
    (["--max_length", "long"], "--max_length: invalid int value: 'long'"),
    (["--overlong", "keep"], "--overlong: invalid choice: 'keep'"),
    (["--eval_share", "1"], "eval_share must be at least 0 and below 1, not 1"),
    (["--workers", "0"], "workers must be a whole number of 1 or more, not 0"),
    (["--max_len", "64"], "unrecognized arguments: --max_len 64"),
    (["--output_path", "{dir}/good.jsonl"], "good.jsonl is a file; give a directory"),
    (["--output_path", "{dir}/good.jsonl/out"], "good.jsonl is a file; give a directory"),
    (["--output_path", "/proc/none"], "/proc"),
])
def test_bad_input_is_one_sentence_and_status_2(tmp_path, tool, change, error):
    files = {"good": GOOD, "bad": GOOD + "{", "lacks": GOOD + '{"input": "q"}', "empty": "",
             "type": GOOD + '{"input": "q", "output": 3}'}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    before = sorted(path.name for path in tmp_path.iterdir())
    change = [part.format(dir=tmp_path) for part in change]
    status, output, errors = tool(*flags(tmp_path), *change)
    assert status == 2 and output == ""
    assert error in errors and "Traceback" not in errors
    assert errors.strip().splitlines()[-1].count("error: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_leaves_the_old_dataset(tmp_path, tool):
    """A limit on the size of files stops MindSpore's writer in the middle, as a full disk does."""
    assert tool(*flags(tmp_path))[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for target in (tmp_path, tmp_path / "new"):
        done = subprocess.run(
            [sys.executable, str(TOOL), *flags(target, "--seed", "7")],
            capture_output=True, text=True, cwd=tmp_path,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))
        assert done.returncode == 2 and done.stdout == ""
        assert re.fullmatch(r"error: \S+/out cannot be written \(.+\); free some space or give another "
                            r"directory\n", done.stderr), done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert not (tmp_path / "new" / "out").exists()
