"""Weights that AutoGPTQ quantised: its own products, and the official code's logits with them."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from telechat import Generator, InputError, SamplingParams, TeleChat
from telechat.checkpoint.convert import torch_to_ms
from telechat.checkpoint.reader import CheckpointReader
from telechat.quantization.gptq import GptqFiles, dequantise, unpack
from tests.quantization import gptq_writer

torch = pytest.importorskip("torch", reason="conversion needs torch: install the extra `convert`")


def weights(official):
    return torch.load(next(official.glob("*.bin")), weights_only=True)


@pytest.fixture(scope="module", params=[4, 8])
def official(request, shared):
    return shared / f"reference/gptq_12b_{request.param}bit_tiny"


def test_official_products_logits_and_tokens(official, tmp_path):
    golden = np.load(official / "golden.npz")
    torch_to_ms(official, tmp_path / "ms", dequantize=True)
    reader = CheckpointReader(tmp_path / "ms")
    for name, key in (("transformer.h.0.self_attention.query.weight", "query"), ("transformer.h.1.mlp.down_proj.weight", "down_proj")):
        assert reader.dtype(name) == np.float16
        assert np.array_equal(reader.read(name).astype(np.float32), golden[f"weight_fp16_{key}"])
    model = TeleChat.from_pretrained(tmp_path / "ms")
    expected = golden["logits_fp16_weights"]
    assert np.abs(model(golden["input_ids"]).asnumpy() - expected).max() < 1e-5 * np.abs(expected).max()
    torch_to_ms(official, tmp_path / "float32", dtype="float32", dequantize=True)
    model = TeleChat.from_pretrained(tmp_path / "float32")
    prompts, greedy = golden["prompt_ids"], golden["greedy_ids"]
    params = SamplingParams(max_new_tokens=greedy.shape[1] - prompts.shape[1])
    answers = Generator(model, max_length=64, batch_size=2).generate(prompts.tolist(), params)
    assert [[*prompt, *answer] for prompt, answer in zip(prompts.tolist(), answers)] == greedy.tolist()


def test_float32_products_are_exact(official):
    golden, state = np.load(official / "golden.npz"), weights(official)
    bits = json.loads((official / "quantize_config.json").read_text())["bits"]
    for module, key in (("transformer.h.0.self_attention.query", "weight_query"), ("transformer.h.1.mlp.down_proj", "weight_down_proj")):
        parts = {part: state[f"{module}.{part}"].numpy() for part in ("qweight", "qzeros", "scales", "g_idx")}
        assert np.array_equal(dequantise(bits, **parts), golden[key])
        assert np.array_equal(dequantise(bits, parts["qweight"], parts["qzeros"], parts["scales"]), golden[key])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_unpacking_against_single_bits(bits, axis):
    words = np.random.default_rng(0).integers(-2 ** 31, 2 ** 31, (3, 5), dtype=np.int64).astype(np.int32)
    values, count = unpack(words, bits, axis), 32 // bits
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            word = words[row // count, column] if axis == 0 else words[row, column // count]
            place = row % count if axis == 0 else column % count
            assert values[row, column] == (int(word) & 0xFFFFFFFF) >> (bits * place) & (2 ** bits - 1)


def test_act_order(official):
    """g_idx in another order: each input has its own group's scale and zero."""
    state = weights(official)
    bits = json.loads((official / "quantize_config.json").read_text())["bits"]
    parts = {part: state[f"transformer.h.0.mlp.up_proj.{part}"].numpy() for part in ("qweight", "qzeros", "scales")}
    g_idx = np.random.default_rng(1).permutation(state["transformer.h.0.mlp.up_proj.g_idx"].numpy())
    found = dequantise(bits, **parts, g_idx=g_idx)
    q, z = unpack(parts["qweight"], bits, 0).astype(np.float64), unpack(parts["qzeros"], bits, 1).astype(np.float64) + 1
    for row in (0, 7, len(g_idx) - 1):
        expected = parts["scales"].astype(np.float64)[g_idx[row]] * (q[row] - z[g_idx[row]])
        assert np.allclose(found[:, row], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("group", [128, -1])
def test_without_g_idx_groups_are_of_the_settings_size(tmp_path, group):
    """Some programs leave it out where groups are in order; the last group may be a smaller one."""
    random = np.random.default_rng(0)
    q, scales = gptq_writer.round_to_nearest(random.standard_normal((256, 320)).astype(np.float32), 8, 320 if group < 0 else group)
    parts = gptq_writer.tensors(q, scales, 8, np.arange(320) // (320 if group < 0 else group))
    expected = gptq_writer.read(parts, 8)
    del parts["g_idx"]
    save_file({f"lonely.{name}": array for name, array in parts.items()}, tmp_path / "model.safetensors")
    files = GptqFiles(tmp_path, {"bits": 8, "group_size": group}, set())
    assert np.array_equal(files.product("lonely.weight").dequantised(), expected)


def test_safetensors_and_settings_in_the_config(official, tmp_path):
    """As newer versions write them: model.safetensors and quantization_config."""
    save_file({name: tensor.numpy() for name, tensor in weights(official).items()}, tmp_path / "model.safetensors")
    settings = json.loads((official / "quantize_config.json").read_text())
    config = json.loads((official / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {**settings, "quant_method": "gptq"}}))
    torch_to_ms(tmp_path, tmp_path / "a", dequantize=True)
    torch_to_ms(official, tmp_path / "b", dequantize=True)
    one, other = (CheckpointReader(tmp_path / name) for name in "ab")
    assert all(np.array_equal(one.read(name), other.read(name)) for name in one.names)


@pytest.fixture
def copy(official, tmp_path):
    """copy(change) → a directory with the weights that change(state) has changed."""
    def make(change=lambda state: None, **settings):
        folder = tmp_path / "copy"
        folder.mkdir()
        state = weights(official)
        change(state)
        torch.save(state, folder / next(official.glob("*.bin")).name)
        shutil.copy(official / "config.json", folder / "config.json")
        values = {**json.loads((official / "quantize_config.json").read_text()), **settings}
        (folder / "quantize_config.json").write_text(json.dumps(values))
        return folder
    return make


QUERY = "transformer.h.0.self_attention.query"


@pytest.mark.parametrize("change, settings, said", [
    (lambda state: state.pop(f"{QUERY}.scales"), {}, f"lacks {QUERY}.scales; download it again"),
    (lambda state: state.update({f"{QUERY}.bias": torch.ones(256, dtype=torch.float16)}), {},
     f"{QUERY}.bias in .* is not zero, and the model has no such bias"),
    (lambda state: state.update({f"{QUERY}.qzeros": torch.zeros(2, 3, dtype=torch.int32)}), {},
     rf"{QUERY}.qzeros in .* is \(2, 3\) and must be \(2, "),
    (lambda state: None, {"bits": 3}, "bits must be 4 or 8, not 3"),
    (lambda state: None, {"bits": "four"}, "bits must be a whole number from 2 to 8, not 'four'"),
    (lambda state: None, {"group_size": 0}, "group_size must be -1, for one group a row, or at least 1, not 0"),
])
def test_broken_weights_are_refused(copy, tmp_path, change, settings, said):
    with pytest.raises(InputError, match=said):
        torch_to_ms(copy(change, **settings), tmp_path / "ms", dequantize=True)
    assert not (tmp_path / "ms").exists()


def test_the_flag_goes_with_quantised_weights_alone(shared, tmp_path):
    with pytest.raises(InputError, match="holds no weights that AutoGPTQ quantised; leave --dequantize out"):
        torch_to_ms(shared / "reference/telechat_12b_tiny", tmp_path / "ms", dequantize=True)
    assert not (tmp_path / "ms").exists()
