"""A small random model to evaluate, and the same in plain torch."""

import json

import pytest

from tests.conftest import save_small_model

FIELDS = dict(vocab_size=1664, hidden_size=32, n_layer=2, n_head=4, ffn_hidden_size=48, training_seqlen=768,
              initializer_range=0.3, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluation") / "tiny"
    save_small_model(directory, **FIELDS)
    return directory


@pytest.fixture(scope="session")
def torch_model(checkpoint):
    pytest.importorskip("torch")
    from safetensors.torch import load_file

    from tests.torch_reference import TorchTeleChat

    config = json.loads((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    return TorchTeleChat(config, tensors)
