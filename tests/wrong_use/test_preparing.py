"""Wrong uses of the tools that prepare and look at files: preprocess, convert, inspect."""

import pytest

from tests.wrong_use.checks import check, numbered

PREPROCESS = ["--input_dataset_file", "{lines}", "--output_path", "{out}", "--vocab_file_path", "{tok}", "--max_length", "40"]
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
]


@pytest.mark.parametrize("tool, arguments, words", USES, ids=numbered(USES))
def test_wrong_uses(tool, arguments, words, places, tmp_path, monkeypatch, capsys):
    check(tool, arguments, words, places, tmp_path, monkeypatch, capsys)
