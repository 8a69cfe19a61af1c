"""Small checkpoints in the published layouts, written independently of telechat.checkpoint."""

import json

import pytest

REFERENCE = ("telechat_7b_tiny", "telechat_12b_tiny", "telechat_52b_tiny")


@pytest.fixture(params=REFERENCE)
def reference(request, shared):
    """The directory of one of the three reference checkpoints."""
    return shared / "reference" / request.param


@pytest.fixture
def load_official():
    """Function: directory of .bin files → name → torch tensor, as a plain torch loader reads it."""
    def load(directory):
        import torch
        index = json.loads((directory / "pytorch_model.bin.index.json").read_text())
        state = {}
        for file in sorted(set(index["weight_map"].values())):
            loaded = torch.load(directory / file, weights_only=True)
            assert {name for name, owner in index["weight_map"].items() if owner == file} == set(loaded)
            state.update(loaded)
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in state.values())
        return state
    return load


@pytest.fixture
def make_official():
    """Function that makes (config values, name → torch tensor) in the layout of "7b", "12b" or "52b"."""
    def make(model, hidden=48, layers=2, heads=3, inner=40, vocab=56, dtype="float32", seed=0):
        import torch
        generator = torch.Generator().manual_seed(seed)
        dtype = getattr(torch, dtype)

        def random(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        if model == "52b":
            config = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_inner": inner,
                      "vocab_size": vocab, "n_positions": 64, "add_bias_linear": False,
                      "tie_word_embeddings": False}
            state = {"transformer.wte.weight": random(vocab, hidden)}
            for layer in range(layers):
                state.update({f"transformer.h.{layer}.{name}": tensor for name, tensor in {
                    "ln_1.weight": random(hidden),
                    "attn.masked_bias": torch.tensor(-10000.0, dtype=dtype),
                    "attn.c_attn.weight": random(hidden, 3 * hidden),
                    "attn.c_proj.weight": random(hidden, hidden),
                    "ln_2.weight": random(hidden),
                    "mlp.c_fc.weight": random(hidden, 2 * inner),
                    "mlp.c_proj.weight": random(inner, hidden),
                }.items()})
            state["transformer.ln_f.weight"] = random(hidden)
            state["lm_head.weight"] = random(vocab, hidden)
            return config, state

        config = {"hidden_size": hidden, "n_layer": layers, "n_head": heads, "ffn_hidden_size": inner,
                  "vocab_size": vocab, "training_seqlen": 64, "n_inner": None}
        prefix = ""
        if model == "12b":
            config["tie_word_embeddings"] = False
            prefix = "transformer."
        state = {"word_embeddings.weight": random(vocab, hidden)}
        for layer in range(layers):
            state.update({f"h.{layer}.{name}": tensor for name, tensor in {
                "input_layernorm.weight": random(hidden),
                "self_attention.query.weight": random(hidden, hidden),
                "self_attention.key_value.weight": random(2 * hidden, hidden),
                "self_attention.dense.weight": random(hidden, hidden),
                "self_attention.dense.bias": random(hidden),
                "post_attention_layernorm.weight": random(hidden),
                "mlp.gate_proj.weight": random(inner, hidden),
                "mlp.up_proj.weight": random(inner, hidden),
                "mlp.down_proj.weight": random(hidden, inner),
                "mlp.down_proj.bias": random(hidden),
            }.items()})
        state["ln_f.weight"] = random(hidden)
        state = {prefix + name: tensor for name, tensor in state.items()}
        if model == "12b":
            state["lm_head.weight"] = random(vocab, hidden)
        return config, state
    return make


@pytest.fixture
def write_official(tmp_path):
    """Function that writes what `make_official` made as .bin files, and returns the directory."""
    def write(config, state, name="official", shards=1, separator="_", index=True, zip_format=True):
        import torch
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config))
        names, weight_map = list(state), {}
        for shard in range(shards):
            file = "pytorch_model.bin"
            if shards > 1:
                file = f"pytorch_model{separator}{shard + 1:05d}-of-{shards:05d}.bin"
            part = names[shard * len(names) // shards:(shard + 1) * len(names) // shards]
            torch.save({name: state[name] for name in part}, directory / file,
                       _use_new_zipfile_serialization=zip_format)
            weight_map.update(dict.fromkeys(part, file))
        if index and shards > 1:
            (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory
    return write


def _bits(tensor):
    """(dtype name, shape, bytes) of a torch tensor or numpy array, to compare bit for bit."""
    if hasattr(tensor, "numpy"):
        import torch
        integer = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
        name = str(tensor.dtype).replace("torch.", "")
        return name, tuple(tensor.shape), tensor.contiguous().view(integer).numpy().tobytes()
    return tensor.dtype.name, tensor.shape, tensor.tobytes()


@pytest.fixture
def bits():
    """Function: torch tensor or numpy array → (dtype name, shape, bytes), to compare bit for bit."""
    return _bits


@pytest.fixture
def canonical_of():
    """Function: (config values, official state) → canonical name → torch tensor.

    Says the mapping a second time, by indexing row by row, against telechat.checkpoint.layout.
    """
    def convert(config, state):
        import torch
        if "n_embd" not in config:
            return {name if name.startswith(("transformer.", "lm_head")) else "transformer." + name: tensor
                    for name, tensor in state.items()}
        hidden, heads, inner = config["n_embd"], config["n_head"], config["n_inner"]
        size = hidden // heads
        result = {}
        for name, tensor in state.items():
            block = name.rsplit(".", 3)[0] + "."
            if name.endswith("masked_bias"):
                continue
            if name.endswith("c_attn.weight"):
                result[block + "self_attention.query.weight"] = tensor[:, :hidden].T
                columns = []
                for head in range(heads):
                    for third in (1, 2):
                        start = third * hidden + head * size
                        columns += range(start, start + size)
                result[block + "self_attention.key_value.weight"] = tensor[:, torch.tensor(columns)].T
            elif name.endswith("c_fc.weight"):
                result[block + "mlp.gate_proj.weight"] = tensor[:, :inner].T
                result[block + "mlp.up_proj.weight"] = tensor[:, inner:].T
            elif name.endswith("attn.c_proj.weight"):
                result[block + "self_attention.dense.weight"] = tensor.T
            elif name.endswith("mlp.c_proj.weight"):
                result[block + "mlp.down_proj.weight"] = tensor.T
            else:
                result[name.replace("wte", "word_embeddings").replace("ln_1", "input_layernorm")
                       .replace("ln_2", "post_attention_layernorm")] = tensor
        return result
    return convert
