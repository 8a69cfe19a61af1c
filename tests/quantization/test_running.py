"""Models whose products stay quantised: against the official code, and against their own dequantised weights."""

import json
import os
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

from telechat import Generator, InputError, SamplingParams, TeleChat
from telechat.checkpoint import layout
from telechat.checkpoint.convert import torch_to_ms
from telechat.checkpoint.writer import write_checkpoint
from telechat.config import TeleChatConfig
from telechat.generation.engine import Engine
from telechat.generation.memory import weight_bytes
from telechat.inspection import describe_checkpoint
from telechat.nn.cpu.build import load_library
from telechat.nn.kernel_choice import cpu_obstacle
from telechat.nn.quantised import QuantisedWeight, dequantise, in_order, weight_parameters
from telechat.quantization.checkpoint import QuantisedReader, settings_of, with_settings
from telechat.quantization.gptq import unpacked
from tests.adapter_files import write_adapter
from tests.ascend import on_card
from tests.quantization import gptq_writer

pytest.importorskip("torch", reason="conversion needs torch: install the extra `convert`")
PRODUCTS = ("query", "key_value", "dense", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", params=[4, 8])
def bits(request):
    return request.param


@pytest.fixture(scope="module")
def official(bits, shared):
    return shared / f"reference/gptq_12b_{bits}bit_tiny"


@pytest.fixture(scope="module")
def converted(official, tmp_path_factory):
    directory = tmp_path_factory.mktemp("quantised") / "ms"
    torch_to_ms(official, directory)
    return directory


@pytest.fixture(params=["cpu", "portable"])
def kernels(request):
    if request.param == "cpu" and load_library() is None:
        pytest.skip("there is no C++ compiler here")
    return request.param


def test_official_logits_and_tokens(converted, official, kernels):
    golden = np.load(official / "golden.npz")
    model = TeleChat.from_pretrained(converted, kernels=kernels)
    assert np.abs(model(golden["input_ids"]).asnumpy() - golden["logits"]).max() < 1e-5 * np.abs(golden["logits"]).max()
    prompts, greedy = golden["prompt_ids"], golden["greedy_ids"]
    params = SamplingParams(max_new_tokens=greedy.shape[1] - prompts.shape[1])
    answers = Generator(model, max_length=64, batch_size=2).generate(prompts.tolist(), params)
    assert [[*prompt, *answer] for prompt, answer in zip(prompts.tolist(), answers)] == greedy.tolist()


def test_weights_stay_quantised(converted, bits):
    """What the model holds is its packed values and scales: no product is there in another form."""
    model = TeleChat.from_pretrained(converted)
    held = {parameter.name: parameter for parameter in model.get_parameters()}
    config = model.config
    for name, (*outputs, inputs) in layout.parameter_shapes(config).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in PRODUCTS:
            assert tuple(held.pop(name).shape) == (*outputs, inputs)
            continue
        assert held.pop(f"{module}.qweight").nbytes == outputs[0] * inputs * bits // 8
        assert held.pop(f"{module}.scales").nbytes == outputs[0] * (inputs // 128) * 4
    assert not held
    assert weight_bytes(config, 4) == sum(parameter.nbytes for parameter in model.get_parameters())
    with pytest.raises(InputError, match="quantised, and it is not written again"):
        model.save_pretrained(os.path.join(converted, "again"))


def test_written_as_autogptq_writes(converted, official, bits):
    """The tensors are the official file's own, but for biases that the model does not have."""
    import torch

    state = torch.load(next(official.glob("*.bin")), weights_only=True)
    found = load_file(converted / "model.safetensors")
    assert all(np.array_equal(array, state[name].numpy()) for name, array in found.items())
    missing = set(state) - set(found)
    assert all(name.endswith(".bias") and not state[name].any() for name in missing)
    settings = json.loads((converted / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["bits"], settings["group_size"]) == ("gptq", bits, 128)


@pytest.mark.parametrize("model", ["telechat_7b", "telechat_52b", "telechat2", "telechat3"])
@pytest.mark.parametrize("act_order", [False, True])
def test_every_layout(model, act_order, shared, tmp_path):
    """A published model whose products are quantised is the model that has the dequantised weights."""
    source = shared / f"reference/{model}_tiny"
    torch_to_ms(source, tmp_path / "plain", dtype="float32")
    config = TeleChatConfig.from_pretrained(source)
    random = np.random.default_rng(0)
    orders, state, weights = {}, {}, load_file(tmp_path / "plain/model.safetensors")
    for tensor in layout.official_parameters(config):
        module = tensor.name.removesuffix(".weight")
        parts = [tensor.join(*(weights[name] for name in tensor.parameters))]
        if len(tensor.shape) == 1 or module.endswith(("embeddings", "wte", "embed_tokens", "lm_head")):
            state[tensor.name] = np.ascontiguousarray(parts[0])
            continue
        weight = parts[0].T if config.style == "gpt2" else parts[0]
        if weight.shape[1] % 16:  # AutoGPTQ leaves such a product out
            state[tensor.name] = np.ascontiguousarray(parts[0])
            continue
        q, scales = gptq_writer.round_to_nearest(weight, 4, 32)
        g_idx = np.arange(len(q)) // 32
        if act_order:
            g_idx = orders.setdefault(tensor.partners or tensor.name, random.permutation(g_idx))
        for part, array in gptq_writer.tensors(q, scales, 4, g_idx).items():
            state[f"{module}.{part}"] = array
    (tmp_path / "official").mkdir()
    save_file(state, tmp_path / "official/model.safetensors")
    values = {**json.loads((source / "config.json").read_text()),
              "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": act_order}}
    (tmp_path / "official/config.json").write_text(json.dumps(values))
    torch_to_ms(tmp_path / "official", tmp_path / "quantised")
    dequantised = {}
    for tensor in layout.official_parameters(config):
        module = tensor.name.removesuffix(".weight")
        if f"{module}.qweight" in state:
            weight = gptq_writer.read({part: state[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}, 4)
            state[tensor.name] = np.ascontiguousarray(weight.T if config.style == "gpt2" else weight)
        dequantised[tensor.name] = state[tensor.name]
    (tmp_path / "float").mkdir()
    save_file(dequantised, tmp_path / "float/model.safetensors")
    shutil.copy(source / "config.json", tmp_path / "float/config.json")
    torch_to_ms(tmp_path / "float", tmp_path / "expected")
    ids = np.load(source / "golden.npz")["input_ids"]
    expected = TeleChat.from_pretrained(tmp_path / "expected", kernels="portable")(ids).asnumpy()
    found = TeleChat.from_pretrained(tmp_path / "quantised")(ids).asnumpy()
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def weight_of(bits, outputs, inputs, groups, act_order=False, seed=0):
    random = np.random.default_rng(seed)
    most = 2 ** (bits - 1)
    order = random.permutation(inputs).astype(np.int32) if act_order else None
    return QuantisedWeight(bits, random.integers(-most, most, (outputs, inputs)).astype(np.int8),
                           random.uniform(0.5, 1.5, (outputs, groups)).astype(np.float32) / most, order)


SIZES = [(4, 16, 1), (37, 48, 3), (5, 176, 11), (64, 256, 2), (33, 320, 5)]


@ms.jit
def dequantised(weight, inputs):
    return dequantise(weight, inputs)


@pytest.mark.parametrize("outputs, inputs, groups", SIZES)
def test_dequantised_in_a_graph(bits, outputs, inputs, groups):
    weight = weight_of(bits, outputs, inputs, groups)
    expected = weight.values.astype(np.float32) * np.repeat(weight.scales, inputs // groups, 1)
    found = dequantised(ms.mutable(tuple(part.data for part in weight_parameters(weight, ms.float32))), inputs)
    assert np.array_equal(found.asnumpy(), expected)


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 40])
@pytest.mark.parametrize("outputs, inputs, groups", SIZES)
@pytest.mark.parametrize("act_order", [False, True])
def test_operator_for_cpus(bits, rows, outputs, inputs, groups, act_order):
    """To the bit the product with the dequantised weight, and within rounding that in float64."""
    if load_library() is None:
        pytest.skip("there is no C++ compiler here")
    from telechat.nn.cpu.kernels import CpuKernels

    kernels, weight = CpuKernels(), weight_of(bits, outputs, inputs, groups, act_order)
    random = np.random.default_rng(1)
    x, bias = (Tensor(random.standard_normal(shape).astype(np.float32)) for shape in ((rows, inputs), (outputs,)))
    found = kernels.linear(x, weight_parameters(weight, ms.float32), bias).asnumpy()
    plain = QuantisedWeight(weight.bits, weight.values, weight.scales).dequantised()
    ordered = in_order(x, (None, None, Tensor(weight.order))) if act_order else x
    assert np.array_equal(found, kernels.linear(ordered, Tensor(plain), bias).asnumpy())
    packed, scales = weight_parameters(weight, ms.float32)[:2]
    assert np.array_equal(kernels.operators.dequantise(packed, scales, x).asnumpy(), plain)
    expected = x.asnumpy().astype(np.float64) @ weight.dequantised().T.astype(np.float64) + bias.asnumpy()
    assert np.abs(found - expected).max() < 2e-6 * np.abs(expected).max() * np.sqrt(inputs)


def product_of(bits=4, outputs=32, inputs=256, group=64, g_idx=None):
    weight = np.random.default_rng(2).standard_normal((outputs, inputs)).astype(np.float32)
    parts = gptq_writer.tensors(*gptq_writer.round_to_nearest(weight, bits, group), bits,
                                np.arange(inputs) // group if g_idx is None else g_idx)
    return unpacked(bits, *parts.values()), gptq_writer.read(parts, bits)


@pytest.mark.parametrize("outputs, inputs", [(slice(0, 16), slice(0, 256)), (slice(16, 32), slice(0, 256)),
                                             (slice(0, 32), slice(96, 192)), (slice(0, 32), slice(128, 256))])
def test_parts_of_a_product(bits, outputs, inputs):
    """What a tensor-parallel process holds; where it begins or ends within a group, groups become smaller."""
    product, weight = product_of(bits)
    assert np.array_equal(product.weight(bits, "w", (outputs, inputs)).dequantised(), weight[outputs, inputs])


def test_what_cannot_be_computed_is_refused(bits):
    product, _ = product_of(bits, g_idx=np.random.default_rng(0).permutation(np.arange(256) // 64))
    with pytest.raises(InputError, match="^w is quantised with act-order .desc_act., which tensor parallelism cannot cut"):
        product.weight(bits, "w", (slice(0, 16), slice(0, 256)))
    product, _ = product_of(bits, group=8)
    with pytest.raises(InputError, match="^w: parts of a group of 8 inputs are too small"):
        product.weight(bits, "w")
    product, _ = product_of(bits)
    product.zeros[1, 3] -= 1
    with pytest.raises(InputError, match="^w is quantised asymmetrically"):
        product.weight(bits, "w")


def test_adapters_answer_beside_quantised_weights(official, converted, tmp_path, kernels, monkeypatch):
    """Rows with an adapter and without in one call: the logits of the dequantised weights with the adapter added, but for the
    rounding of those to float16, which the converter does."""
    torch_to_ms(official, tmp_path / "whole", dtype="float32", dequantize=True)
    adapter = write_adapter(tmp_path / "adapter", TeleChatConfig.from_pretrained(tmp_path / "whole"), 4, size=0.05)
    prompts = [list(range(5, 16)), list(range(40, 60))]
    monkeypatch.setattr("telechat.nn.kernel_choice.cpu_obstacle", cpu_obstacle if kernels == "cpu" else lambda dtype: "off")
    found = np.array(on_card.adapted(converted, [adapter, None], prompts, "float32")["logits"])
    for row, lora in enumerate((adapter, None)):
        expected = TeleChat.from_pretrained(tmp_path / "whole", lora=lora)(np.array([[*prompts[row], 5]])).asnumpy()[0, -2:]
        assert np.abs(found[:, row] - expected).max() < 2e-3 * np.abs(expected).max()
        assert np.abs(found[:, 1 - row] - expected).max() > 0.1 * np.abs(expected).max()


@pytest.fixture(scope="module")
def dequantised_model(converted, tmp_path_factory):
    """The same model with its products' weights in float32."""
    directory, reader = tmp_path_factory.mktemp("dequantised") / "ms", QuantisedReader(converted)
    values = ((name, reader.read(name)) for name in reader.names)
    write_checkpoint(directory, with_settings(reader.config, None), (
        (name, value.dequantised() if isinstance(value, QuantisedWeight) else value.astype(np.float32)) for name, value in values))
    return directory


@pytest.mark.parametrize("kernels, some", [
    ("cpu", {}), ("cpu", {"targets": ["self_attention.key_value", "mlp.down_proj"], "layers": (1,)}),
    ("portable", {"rank_pattern": {"query": 2, "1.mlp.down_proj": 7}})], indirect=["kernels"])
def test_one_adapter_for_all_stays_beside_quantised_weights(converted, dequantised_model, tmp_path, kernels, some, bits):
    """`TeleChat.from_pretrained` with ``lora``: what the dequantised weights give with the adapter added to them."""
    adapter = write_adapter(tmp_path / "adapter", TeleChatConfig.from_pretrained(dequantised_model), 4, size=0.05, **some)
    ids = np.random.default_rng(0).integers(5, 90, (2, 12))
    found, expected = [], []
    for directory, logits in ((converted, found), (dequantised_model, expected)):
        model = TeleChat.from_pretrained(directory, kernels=kernels, lora=adapter)
        logits.append(model(ids).asnumpy())
        if kernels == "cpu" or bits == 4:  # compiling takes seconds, and once is enough
            engine = Engine(model, 64)
            engine.reserve(2, 64)
            logits += [engine.prefill([0, 1], ids.tolist()), engine.decode([0, 1], [7, 8], [12, 12])]
    plain = TeleChat.from_pretrained(converted, kernels=kernels)(ids).asnumpy()
    assert np.abs(plain - expected[0]).max() > 0.02 * np.abs(plain).max(), "the adapter does something"
    for one, other in zip(found, expected):
        assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()


def test_what_inspect_says(converted, bits):
    lines = {line.split()[0]: line.split() for line in describe_checkpoint(converted, statistics=True) if line.startswith("transformer")}
    found = lines["transformer.h.*.mlp.up_proj.weight"]
    assert found[1:4] == ["2", "384×256", f"int{bits}"] and lines["transformer.ln_f.weight"][3] == "float16"
    product = load_file(converted / "model.safetensors")
    weights = [gptq_writer.read({part: product[f"transformer.h.{layer}.mlp.up_proj.{part}"] for part in
                                 ("qweight", "qzeros", "scales", "g_idx")}, bits) for layer in range(2)]
    assert found[7] == f"{max(weight.max() for weight in weights):.2e}"


def test_settings_are_checked_before_anything_is_reckoned_with_them():
    config = with_settings(TeleChatConfig(56, 48, 1, 3, 40), {"quant_method": "gptq", "bits": 4, "group_size": "128"})
    with pytest.raises(InputError, match="config.json: quantization_config: group_size must be a whole number"):
        settings_of(config)


def test_directories_given_by_mistake(official, converted, shared):
    with pytest.raises(InputError, match="holds weights as AutoGPTQ wrote them: run .*torch-to-ms"):
        TeleChat.from_pretrained(official)
    with pytest.raises(InputError, match=r"is \(4, 176\) and must be \(4, 384\) for this model"):
        TeleChat.from_pretrained(converted, lora=shared / "reference/lora_12b/adapter_a")
