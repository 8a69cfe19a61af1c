"""Quantising: the choice of values against slow references, a whole checkpoint against its own model, and the tool."""

import contextlib
import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from telechat import InputError, TeleChat
from telechat.checkpoint.reader import CheckpointReader
from telechat.evaluation.forward import Forward
from telechat.evaluation.run import read_sequences
from telechat.generation.settings import GenerationSettings
from telechat.quantization.quantise import HELD_OUT, check_request
from telechat.quantization.rounding import DAMPING, gptq, relative_error, round_to_nearest
from tests.conftest import ROOT, load_tool, save_small_model
from tests.quantization import gptq_writer

quantize = load_tool("quantize")


def correlated(rows, inputs, seed=0):
    """Inputs that say much of each other, some of them far larger than others, as activations are."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((rows, inputs // 4)) @ random.standard_normal((inputs // 4, inputs))
    return ((mixed + 0.3 * random.standard_normal((rows, inputs))) * random.lognormal(0, 1, inputs)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_round_to_nearest(bits):
    weight = np.random.default_rng(0).standard_normal((24, 96)).astype(np.float32)
    weight[3, 32:64] = 0
    product = round_to_nearest(weight, bits, 32)
    scales = np.repeat(product.scales.astype(np.float64), 32, 0).T
    error = np.abs(weight - product.dequantised())
    # Half a step everywhere, but for the largest value of a group, whose place is half a step beyond the last.
    assert (error <= scales * 0.5001).mean() > 0.96 and (error <= scales * 1.001).all()
    assert np.array_equal(product.dequantised()[3, 32:64], np.zeros(32))
    expected = 2 * np.abs(weight.reshape(24, 3, 32)).max(2) / (2 ** bits - 1)
    expected[3, 1] = 1  # of a group of zeros
    assert np.allclose(product.scales.T, expected, rtol=1e-3)


def optimal_brain_quantiser(weight, hessian, bits, group):
    """One input after another, the others making up for its error, with a new inverse each time; in float64."""
    weight, inputs, middle = weight.astype(np.float64), weight.shape[1], 2 ** (bits - 1)
    hessian = hessian + np.eye(inputs) * DAMPING * np.diag(hessian).mean()
    values = np.zeros(weight.shape)
    for i in range(inputs):
        if i % group == 0:
            scales = (2 * np.abs(weight[:, i:i + group]).max(1) / (2 ** bits - 1)).astype(np.float16).astype(np.float64)
        inverse = np.linalg.inv(hessian[i:, i:])
        values[:, i] = np.clip(np.rint(weight[:, i] / scales) + middle, 0, 2 ** bits - 1)
        error = (weight[:, i] - scales * (values[:, i] - middle)) / inverse[0, 0]
        weight[:, i:] -= np.outer(error, inverse[0])
    return values


@pytest.mark.parametrize("bits, group", [(4, 32), (4, 192), (8, 64)])
def test_gptq_against_the_formula(bits, group):
    x, weight = correlated(500, 192), np.random.default_rng(1).standard_normal((16, 192)).astype(np.float32)
    hessian = x.astype(np.float64).T @ x.astype(np.float64)
    product = gptq(weight.copy(), hessian.copy(), bits, group)
    expected = optimal_brain_quantiser(weight, hessian, bits, group)
    # A value on the border between two goes either way, and what follows it after that.
    assert (product.values.T == expected).mean() > 0.98


def test_gptq_loses_less_where_inputs_are_correlated():
    x, weight = correlated(500, 256), np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    hessian = x.astype(np.float64).T @ x.astype(np.float64)
    losses = []
    for product in (gptq(weight.copy(), hessian.copy(), 4, 128), round_to_nearest(weight, 4, 128)):
        outputs = x.astype(np.float64) @ (weight - product.dequantised()).T.astype(np.float64)
        losses.append(np.square(outputs).sum() / np.square(x.astype(np.float64) @ weight.T.astype(np.float64)).sum())
        assert relative_error(weight, product, hessian) == pytest.approx(losses[-1], rel=1e-2)
    assert losses[0] < losses[1] / 2


def test_inputs_that_are_never_there():
    x, weight = correlated(300, 64), np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    x[:, 5] = 0
    product = gptq(weight.copy(), x.astype(np.float64).T @ x.astype(np.float64), 8, 32)
    assert np.isfinite(product.dequantised()).all() and relative_error(np.delete(weight, 5, 1), product_without(product, 5)) < 1e-3


def product_without(product, column):
    class Rest:
        def dequantised(self):
            return np.delete(product.dequantised(), column, 1)
    return Rest()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quantise") / "small"
    save_small_model(directory, training_seqlen=128, num_key_value_heads=2, tie_word_embeddings=False)
    return directory


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    lines = (ROOT / "samples/conversations.jsonl").read_text(encoding="utf-8").splitlines(True)[:12]
    path = tmp_path_factory.mktemp("calibration") / "some.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=[4, 8])
def written(request, checkpoint, calibration, tmp_path_factory):
    """(bits, directory, what was printed) of the tool with a calibration."""
    directory, said = tmp_path_factory.mktemp("written") / "ms", io.StringIO()
    with contextlib.redirect_stdout(said):
        quantize.main(["--load_checkpoint", str(checkpoint), "--output_dir", str(directory), "--bits", str(request.param),
                       "--group_size", "16", "--calibration", str(calibration)])
    return request.param, directory, said.getvalue()


def perplexity(directory, calibration):
    """Of the held-out sequences, by a model as everyone loads it."""
    model = TeleChat.from_pretrained(directory)
    settings = GenerationSettings.load(directory, model.config)
    pairs = read_sequences(calibration, settings, model.config.training_seqlen).pairs[::HELD_OUT]
    losses, counts = Forward(model).losses(*zip(*pairs))
    return np.exp(losses.sum() / counts.sum())


def test_perplexities_are_those_of_the_models(written, checkpoint, calibration):
    """What is streamed through a layer at a time ends where the whole models do."""
    bits, directory, said = written
    words = next(line for line in said.splitlines() if line.startswith("perplexity")).split()
    before, after = float(words[words.index("before,") - 1]), float(words[words.index("after") - 1])
    assert before == pytest.approx(perplexity(checkpoint, calibration), rel=1e-4)
    assert after == pytest.approx(perplexity(directory, calibration), rel=1e-4)
    if bits == 8:
        assert after == pytest.approx(before, rel=2e-2)  # of a random model: some 6,700
    assert said.count("layer ") >= 2 and "down_proj " in said


def test_an_independent_reader_gives_nearly_the_weights(written, checkpoint):
    bits, directory, _ = written
    stored, reader = load_file(directory / "model.safetensors"), CheckpointReader(checkpoint)
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["group_size"], settings["desc_act"], settings["sym"]) == (bits, 16, False, True)
    for name in reader.names:
        module, weight = name.removesuffix(".weight"), reader.read(name)
        if f"{module}.qweight" not in stored:
            assert np.array_equal(stored[name], weight)
            continue
        parts = {part: stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        wrong = np.square(gptq_writer.read(parts, bits) - weight).sum() / np.square(weight).sum()
        assert wrong < (2e-2 if bits == 4 else 1e-4)


def test_without_calibration(checkpoint, tmp_path, capsys):
    """Rounding alone; the same bytes at every time."""
    for name in "ab":
        quantize.main(["--load_checkpoint", str(checkpoint), "--output_dir", str(tmp_path / name), "--bits", "4", "--group_size",
                       "16"])
    assert "rounding to the nearest" in capsys.readouterr().out
    stored, weight = load_file(tmp_path / "a/model.safetensors"), CheckpointReader(checkpoint).read("transformer.h.1.mlp.up_proj.weight")
    parts = {part: stored[f"transformer.h.1.mlp.up_proj.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
    assert np.array_equal(gptq_writer.read(parts, 4), round_to_nearest(weight, 4, 16).dequantised())
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert (tmp_path / "a/tokenizer.model").exists()


@pytest.mark.parametrize("change, said", [
    (["--bits", "3"], "--bits must be 8 or 4, not 3"),
    (["--group_size", "20"], "--group_size must be a multiple of 16, or -1 for one group a row, not 20"),
    (["--group_size", "0"], "--group_size must be a multiple of 16, or -1 for one group a row, not 0"),
    (["--group_size", "32"], "--group_size 32 does not divide the 48 inputs of mlp.down_proj; one that does for all products is 16, or let "
     "--pad_ffn widen the feed-forward layers to 64"),
    (["--samples", "1"], "--samples and --max_length must be at least 2"),
    (["--calibration", "{empty}"], "{empty} holds no line of JSON"),
    (["--calibration", "{one}"], "the calibration holds one sequence, and it takes two"),
    (["--output_dir", "{checkpoint}"], "{checkpoint} is both input and output; give another output directory"),
    (["--load_checkpoint", "{quantised}"], "{quantised} holds quantised weights (GPTQ), which only answer, are evaluated and have adapters trained beside them"),
])
def test_bad_input(change, said, checkpoint, calibration, tmp_path):
    places = {"checkpoint": checkpoint, "empty": tmp_path / "empty.jsonl", "one": tmp_path / "one.jsonl", "quantised": tmp_path / "q"}
    places["empty"].write_text("")
    places["one"].write_text(calibration.read_text(encoding="utf-8").splitlines(True)[0], encoding="utf-8")
    shutil.copytree(checkpoint, places["quantised"])
    config = json.loads((checkpoint / "config.json").read_text())
    (places["quantised"] / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    flags = {"--load_checkpoint": "{checkpoint}", "--output_dir": str(tmp_path / "out"), "--bits": "4", "--group_size": "16",
             **dict(zip(change[::2], change[1::2]))}
    with pytest.raises(InputError) as refused:
        quantize.main([part.format(**places) for pair in flags.items() for part in pair])
    assert str(refused.value).startswith(said.format(**places))
    assert not (tmp_path / "out").exists()


def test_padded_feed_forward_layers(checkpoint, tmp_path):
    """48 wide, in groups of 32: what is written is 64 wide and computes what its first 48 columns and rows do."""
    quantize.main(["--load_checkpoint", str(checkpoint), "--output_dir", str(tmp_path / "q"), "--bits", "4", "--group_size", "32",
                   "--pad_ffn"])
    assert CheckpointReader(checkpoint).config.ffn_hidden_size == 48
    stored, reader = load_file(tmp_path / "q/model.safetensors"), CheckpointReader(checkpoint)

    def weight(name, shape):
        module = name.removesuffix(".weight")
        if f"{module}.qweight" not in stored:
            return reader.read(name)
        whole = gptq_writer.read({part: stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}, 4)
        kept = whole[tuple(map(slice, shape))]
        assert whole.shape == tuple(64 if length == 48 else length for length in shape) and np.abs(whole).sum() == np.abs(kept).sum()
        return np.ascontiguousarray(kept)

    ids = np.arange(20, dtype=np.int32).reshape(2, 10)
    expected = TeleChat(reader.config, tensors=weight)(ids).asnumpy()
    found = TeleChat.from_pretrained(tmp_path / "q")(ids).asnumpy()
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_sizes_that_words_do_not_fit(checkpoint):
    config = CheckpointReader(checkpoint).config
    with pytest.raises(InputError, match="cannot be quantised"):
        check_request(dataclasses.replace(config, ffn_hidden_size=40), 8, -1)
