"""The official models' numbers on the simulated card: MindSpore's real Ascend back end, this library's own path."""

import subprocess
import sys

import numpy as np
import pytest

from simulator import report
from telechat import Generator, SamplingParams, TeleChat, TeleChatConfig
from telechat.checkpoint.layout import parameter_shapes
from telechat.checkpoint.products import is_product
from tests.adapter_files import write_adapter
from tests.ascend import on_card
from tests.conftest import MODELS, ROOT, save_small_model

# One of them in every run of the tests, the others by `make test-ascend`.
USUAL = "telechat_12b"
reference_of = pytest.mark.parametrize(
    "reference", [name if name == USUAL else pytest.param(name, marks=pytest.mark.ascend) for name in MODELS], indirect=True)


def far(found, wanted):
    """The largest difference, as a share of the largest value."""
    return np.abs(np.array(found) - wanted).max() / np.abs(wanted).max()


@reference_of
def test_forward_and_training(card, reference):
    golden = reference.golden
    results = card("training", str(reference.directory), str(reference.official / "golden.npz"), ["float32", "bfloat16"])
    wanted = np.stack([golden["train_loss"], golden["train_grad_norm"]], 1)
    exact, rounded = results["float32"], results["bfloat16"]
    for name in set(exact) - {"trace"}:
        assert far(exact[name], golden[name]) < 1e-4, name
    assert np.abs(np.array(exact["trace"]) / wanted - 1).max() < 1e-4
    assert np.abs(np.array(rounded["trace"])[:, 0] / wanted[:, 0] - 1).max() < 0.02
    for name in ("logits", "padded_logits"):
        assert name not in rounded or far(rounded[name], golden[name]) < 0.05, name


@pytest.mark.ascend
@pytest.mark.parametrize("reference", [USUAL], indirect=True)
def test_an_adapter_trains(card, reference, shared):
    """What peft trains on the official code, beside weights in float32 and in bfloat16."""
    golden = np.load(shared / "reference/lora_12b/golden.npz")
    results = card("adapter_training", str(reference.directory), str(shared / "reference/lora_12b/adapter_a"),
                   str(shared / "reference/lora_12b/golden.npz"), ["float32", "bfloat16"])
    wanted = np.stack([golden["train_loss"], golden["train_grad_norm"]], 1)
    assert np.abs(np.array(results["float32"]) / wanted - 1).max() < 1e-4
    assert np.abs(np.array(results["bfloat16"])[:, 0] / wanted[:, 0] - 1).max() < 0.02


@reference_of
@pytest.mark.parametrize("paged", [True, pytest.param(False, marks=pytest.mark.ascend)], ids=["paged", "plain cache"])
def test_greedy_answers_of_prompts_of_different_lengths(card, reference, paged):
    """A prompt, a part of another, and the rest of the first answer's prompt: three prompts, two slots."""
    prompts, wanted = reference.golden["prompt_ids"].tolist(), reference.golden["greedy_ids"].tolist()
    given = [prompts[0], wanted[1][:13], prompts[1]]
    count = 12
    expected = [wanted[0][9:9 + count], wanted[1][13:13 + count], wanted[1][9:9 + count]]
    dtype = "bfloat16"
    if paged and TeleChatConfig.from_pretrained(reference.directory).head_dim % 16:
        pytest.skip("paged attention takes heads of a multiple of 16")
    found = card("generation", str(reference.directory), given, count, dtype, paged)
    assert ("decoding PagedAttention" in found["kernels"]) == paged
    # bfloat16 may choose another token where two are nearly alike, and goes on from there.
    same = [next((place for place, (ours, theirs) in enumerate(zip(*pair)) if ours != theirs), count)
            for pair in zip(found["answers"], expected)]
    assert np.mean(same) >= 0.6 * count and min(same) >= 1, same
    assert found["parts"] < 0.03


@pytest.mark.ascend
@pytest.mark.parametrize("reference", MODELS, indirect=True)
def test_greedy_answers_in_float32_are_the_official_ones(card, reference):
    prompts, wanted = reference.golden["prompt_ids"].tolist(), reference.golden["greedy_ids"].tolist()
    found = card("generation", str(reference.directory), [prompts[0], wanted[1][:13]], 28, "float32")
    assert found["answers"] == [wanted[0][9:37], wanted[1][13:41]]
    assert found["parts"] < 1e-5


@pytest.fixture
def quantised(shared, tmp_path):
    """quantised(bits) → a directory of ours with the official products of so many bits, and their numbers."""
    def convert(bits):
        from telechat.checkpoint.convert import torch_to_ms

        official = shared / f"reference/gptq_12b_{bits}bit_tiny"
        torch_to_ms(official, tmp_path / "ms")
        return str(tmp_path / "ms"), np.load(official / "golden.npz")
    return convert


@pytest.mark.ascend
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_answer(card, quantised, bits):
    """Dequantised in the graph, product by product: the official tokens in float32."""
    directory, golden = quantised(bits)
    prompts, wanted = golden["prompt_ids"].tolist(), golden["greedy_ids"].tolist()
    found = card("generation", directory, prompts, 12, "float32")
    assert found["answers"] == [ids[len(prompt):len(prompt) + 12] for prompt, ids in zip(prompts, wanted)]


@pytest.mark.parametrize("bits, dtype", [(4, "bfloat16"), *(pytest.param(*case, marks=pytest.mark.ascend) for case in (
    (4, "float16"), (8, "bfloat16"), (8, "float16")))])
def test_weights_stay_quantised_on_the_card(card, quantised, tmp_path, bits, dtype):
    """Every product of a block is a WeightQuantBatchMatmul, and no other operation sees a tensor of a weight's shape."""
    directory, golden = quantised(bits)
    prompts = golden["prompt_ids"].tolist()
    found = card("adapted", directory, [None, None], prompts, dtype, SIM_LOG=str(tmp_path / "log"))
    model = TeleChat.from_pretrained(directory)
    config = model.config
    ids = np.array([[*prompt, 5] for prompt in prompts], np.int32)
    expected = model(ids).asnumpy()[:, -2:].transpose(1, 0, 2)
    # Activations and scales are rounded to the dtype; the scales of the file are float16.
    assert far(found["logits"], expected) < (0.04 if dtype == "bfloat16" else 0.005)
    launched = [event for event in report.read(str(tmp_path / "log")) if event.kind == "launch"]
    products = [event for event in launched if event.name == "aclnnWeightQuantBatchMatmulV2"]
    assert len(products) == 2 * 6 * config.n_layer  # of the prompts, and of a token
    assert all(f"weight int{bits} (" in event.details for event in products)
    shapes = [shape for name, shape in parameter_shapes(config).items() if is_product(name)]
    texts = {f"({a},{b})" for a, b in [*shapes, *(shape[::-1] for shape in shapes)] if a != b}
    assert len(texts) == 4 and not any(text in event.details for text in texts for event in launched if event not in products)


@pytest.mark.ascend
@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_trains_beside_quantised_weights(card, quantised, tmp_path, bits):
    """The trace of a CPU in float32; there it is that beside the dequantised weights (tests/adapters/test_training.py)."""
    directory, golden = quantised(bits)
    model = TeleChat.from_pretrained(directory)
    adapter = write_adapter(tmp_path / "adapter", model.config, 4, size=0.05)
    random = np.random.default_rng(0)
    ids = random.integers(4, model.config.vocab_size, (3, 2, 24)).astype(np.int32)
    np.savez(tmp_path / "batches.npz", train_input_ids=ids, train_labels=ids)
    arguments = [directory, str(adapter), str(tmp_path / "batches.npz")]
    wanted = np.array(on_card.adapter_training(*arguments, ["float32"])["float32"])
    results = card("adapter_training", *arguments, ["float32", "bfloat16"])
    assert np.abs(np.array(results["float32"]) / wanted - 1).max() < 1e-4
    assert np.abs(np.array(results["bfloat16"])[:, 0] / wanted[:, 0] - 1).max() < 0.02


@pytest.mark.ascend
def test_telechat2_with_grouped_heads_decodes_paged_and_guesses_ahead(card, tmp_path):
    """Heads of 16, which paged attention takes; the answers of the portable kernels in float32, guesses or not."""
    config = TeleChatConfig.from_dict(dict(
        model_type="telechat", vocab_size=96, hidden_size=64, n_layer=2, n_head=4, num_key_value_heads=2, ffn_hidden_size=48,
        layer_norm_epsilon=1e-8, initializer_range=0.3, tie_word_embeddings=False, training_seqlen=128, base_seqlen=64))
    TeleChat(config).save_pretrained(tmp_path / "model")
    prompts, count = [[5, 9, 3, 7, 5, 9, 3, 7], [8, 1, 8, 1, 8, 1, 8, 1, 8]], 20
    model = TeleChat.from_pretrained(tmp_path / "model", kernels="portable")
    expected = Generator(model, max_length=64, batch_size=2).generate(prompts, SamplingParams(count))
    answers = []
    for speculate in (0, 3):
        found = card("generation", str(tmp_path / "model"), prompts, count, "bfloat16", True, speculate)
        assert "decoding PagedAttention" in found["kernels"] and found["parts"] < 0.03
        answers.append(found["answers"])
    assert answers[1] == answers[0]
    same = [sum(ours == theirs for ours, theirs in zip(*pair)) for pair in zip(answers[0], expected)]
    assert np.mean(same) >= 0.6 * count, same


@pytest.mark.ascend
@pytest.mark.parametrize("bits, group", [(4, 32), (8, -1)])
def test_the_tool_answers_with_what_the_other_tool_has_quantised(tmp_path, bits, group):
    """generate.py on the card with a directory of quantize.py, in groups and with a scale a row; the CPU's first token."""
    from simulator.environment import environment, unavailable
    from telechat.quantization.quantise import quantise

    if unavailable():
        pytest.skip(unavailable())
    save_small_model(tmp_path / "model", hidden_size=64, ffn_hidden_size=96, initializer_range=0.3)
    quantise(tmp_path / "model", tmp_path / "q", bits, group, say=lambda line: None)
    command = [sys.executable, "tools/generate.py", "--load_checkpoint", str(tmp_path / "q"), "--predict_data", "你好",
               "--temperature", "0", "--max_new_tokens", "1"]
    answers = [subprocess.run([*command, "--dtype", dtype], env=where, cwd=ROOT, capture_output=True, text=True, timeout=300)
               for dtype, where in (("float32", None), ("float16", environment(SIM_LOG=str(tmp_path / "log"))))]
    assert [answer.returncode for answer in answers] == [0, 0], answers[1].stderr[-2000:]
    assert answers[0].stdout == answers[1].stdout
    products = [event for event in report.read(str(tmp_path / "log")) if event.name == "aclnnWeightQuantBatchMatmulV2"]
    assert products and all(f"weight int{bits} (" in event.details for event in products)
