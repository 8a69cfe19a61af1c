"""Adapters beside the weights: their factors in our layout, and what rows of a batch get by them."""

import numpy as np
import pytest

from telechat import InputError
from telechat.adapters.peft import Adapter
from telechat.adapters.unmerged import PRODUCTS, AdapterSet
from telechat.config import TeleChatConfig
from telechat.parallel.plan import local_slices
from tests.adapter_files import PRODUCTS as MODULES
from tests.adapter_files import write_adapter


def targets_of(config, which):
    """Modules of a layout by number, as peft names them."""
    return [MODULES[config.style][number] for number in which]


def test_factors_multiply_to_what_merging_adds(reference, tmp_path):
    """In every layout, fused and split modules among them, with one of a pair alone, and with rank-stabilised scale."""
    config = TeleChatConfig.from_pretrained(reference.directory)
    for number, (which, settings) in enumerate((((0, 1, 2), {}), ((1, -1), {"use_rslora": True}))):
        folder = write_adapter(tmp_path / str(number), config, 3, targets_of(config, which), seed=number, **settings)
        adapter = Adapter(folder, config)
        assert adapter.parameters
        for name in adapter.parameters:
            a, b = adapter.factors(name)
            delta = adapter.delta(name)
            assert len(a) == b.shape[1] == adapter.rank(name) and a.dtype == b.dtype == np.float32
            assert np.abs(b.astype(np.float64) @ a - delta).max() < 1e-6 * np.abs(delta).max(), name


def test_rows_get_the_product_of_their_own_adapter(reference, tmp_path):
    config = TeleChatConfig.from_pretrained(reference.directory)
    adapters = {"all": Adapter(write_adapter(tmp_path / "all", config, 4, seed=1), config),
                "some": Adapter(write_adapter(tmp_path / "some", config, 2, targets_of(config, (0, -1)), 2, layers=(1,)), config)}
    beside = AdapterSet(adapters, config, np.asarray)
    assert beside.names == ("all", "some") and len(beside.layers) == config.n_layer
    rows = ["some", None, "all", "some"]
    columns = beside.columns(rows)
    assert columns.shape == (4, beside.rank) and beside.columns([None, None]) is None
    x = np.random.default_rng(3).standard_normal((4, 4096)).astype(np.float32)
    for layer in range(config.n_layer):
        for number, product in enumerate(PRODUCTS):
            a, b = beside.layers[layer][2 * number:2 * number + 2]
            parameter = f"transformer.h.{layer}.{product}.weight"
            found = ((x[:, :a.shape[1]] @ a.T) * columns) @ b.T
            for row, name in enumerate(rows):
                delta = 0 * (b @ a)
                if name is not None and parameter in adapters[name].parameters:
                    delta = adapters[name].delta(parameter)
                assert np.allclose(found[row], delta @ x[row, :a.shape[1]], atol=1e-4), (parameter, name)
    assert beside.nbytes == 4 * sum(factor.size for layer in beside.layers for factor in layer)


def test_the_parts_of_two_ranks_add_up(reference, tmp_path):
    """Rows of column-parallel products side by side, sums of row-parallel ones: the whole product."""
    config = TeleChatConfig.from_pretrained(reference.directory)
    adapters = {"one": Adapter(write_adapter(tmp_path / "one", config, 2), config)}
    whole = AdapterSet(adapters, config, np.asarray)
    parts = [AdapterSet(adapters, config, np.asarray, lambda name, shape, rank=rank: local_slices(name, shape, rank, 2))
             for rank in range(2)]
    for number, product in enumerate(PRODUCTS):
        a, b = whole.layers[0][2 * number:2 * number + 2]
        deltas = [part.layers[0][2 * number + 1] @ part.layers[0][2 * number] for part in parts]
        axis = 1 if product.endswith(("dense", "down_proj")) else 0
        assert np.allclose(np.concatenate(deltas, axis), b @ a, atol=1e-6), product


def test_a_head_that_an_adapter_changes_is_refused(tmp_path):
    config = TeleChatConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2, ffn_hidden_size=48, tie_word_embeddings=False)
    folder = write_adapter(tmp_path / "head", config, 2, ["lm_head", "mlp.up_proj"])
    with pytest.raises(InputError, match=r"head changes lm_head, which lies outside the blocks; merge it into the model"):
        AdapterSet({"head": Adapter(folder, config)}, config, np.asarray)
