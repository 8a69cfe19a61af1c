"""Rows with LoRA adapters and without, in one call on the simulated card: the logits of the merged models on the CPU."""

import numpy as np
import pytest

from telechat import TeleChat, TeleChatConfig
from telechat.quantization.quantise import quantise
from tests.adapter_files import write_adapter
from tests.conftest import save_small_model


@pytest.mark.ascend
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.05)])
def test_unmerged_logits_are_the_merged_models(card, tmp_path, dtype, tolerance):
    """float32 by graphs on a plain cache, bfloat16 by PagedAttention."""
    base = tmp_path / "base"
    save_small_model(base, hidden_size=64, ffn_hidden_size=64)
    config = TeleChatConfig.from_pretrained(base)
    one = write_adapter(tmp_path / "one", config, 16, seed=1, size=0.1)
    two = write_adapter(tmp_path / "two", config, 16, ["self_attention.query", "mlp.down_proj"], seed=2, size=0.1)
    adapters = [str(one), None, str(two)]
    prompts = [np.random.default_rng(row).integers(3, 1600, 9 + 5 * row).tolist() for row in range(3)]
    found = card("adapted", str(base), adapters, prompts, dtype)
    assert ("PagedAttention" in found["kernels"]) == (dtype == "bfloat16")
    for row, adapter in enumerate(adapters):
        expected, plain = (TeleChat.from_pretrained(base, lora=lora)(np.array([[*prompts[row], 5]])).asnumpy()[0, -2:]
                           for lora in (adapter, None))
        assert np.abs(np.array(found["logits"])[:, row] - expected).max() < tolerance * np.abs(expected).max()
        assert adapter is None or np.abs(plain - expected).max() > 3 * tolerance * np.abs(expected).max()


@pytest.mark.ascend
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float16", 0.01)])
def test_an_adapter_beside_quantised_weights(card, tmp_path, dtype, tolerance):
    """float32 dequantises each product, float16 has WeightQuantBatchMatmul and PagedAttention: the CPU's logits."""
    save_small_model(tmp_path / "model", hidden_size=64, ffn_hidden_size=64)
    quantise(tmp_path / "model", tmp_path / "q", 4, 32, say=lambda line: None)
    adapter = write_adapter(tmp_path / "adapter", TeleChatConfig.from_pretrained(tmp_path / "model"), 16, seed=1, size=0.1)
    prompts = [np.random.default_rng(row).integers(3, 1600, 9 + 5 * row).tolist() for row in range(2)]
    found = np.array(card("adapted", str(tmp_path / "q"), [None, None], prompts, dtype, str(adapter))["logits"])
    for row, prompt in enumerate(prompts):
        expected, plain = (TeleChat.from_pretrained(tmp_path / "q", lora=lora)(np.array([[*prompt, 5]])).asnumpy()[0, -2:]
                           for lora in (adapter, None))
        assert np.abs(found[:, row] - expected).max() < tolerance * np.abs(expected).max()
        assert np.abs(plain - expected).max() > 3 * tolerance * np.abs(expected).max()
