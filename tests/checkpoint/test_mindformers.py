"""mindformers-to-ms on files made here from the facts of that layout, by another road than the library's."""

import json
import os

import numpy as np
import pytest

from telechat.checkpoint.convert import mindformers_to_ms, torch_to_ms
from telechat.checkpoint.layout import parameter_shapes
from telechat.checkpoint.reader import CheckpointReader
from telechat.errors import InputError

mindspore = pytest.importorskip("mindspore")
torch = pytest.importorskip("torch", reason="the published layout is read with torch")

BLOCK = {
    "input_layernorm.weight": "attention_norm.weight", "self_attention.query.weight": "attention.wq.weight",
    "self_attention.key_value.weight": "attention.wk_v.weight",
    "self_attention.dense.weight": "attention.wo.weight",
    "self_attention.dense.bias": "attention.wo.bias", "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight", "mlp.down_proj.bias": "feed_forward.w2.bias",
    "mlp.up_proj.weight": "feed_forward.w3.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
    "ln_1.weight": "attention_norm.weight", "attn.c_attn.weight": "attention.w_qkv.weight",
    "attn.c_proj.weight": "attention.wo.weight", "ln_2.weight": "ffn_norm.weight",
    "mlp.c_fc.weight": "feed_forward.w_gate_hidden.weight", "mlp.c_proj.weight": "feed_forward.w2.weight",
}
OTHER = {"word_embeddings.weight": "model.tok_embeddings.embedding_weight",
         "wte.weight": "model.tok_embeddings.embedding_weight",
         "ln_f.weight": "model.norm_out.weight", "lm_head.weight": "lm_head.weight"}


def to_mindformers(config, state, mp):
    """Published names and tensors → MindFormers' names and arrays, fused for `mp` cards."""
    result = {}
    for name, tensor in state.items():
        if name.endswith("masked_bias"):
            continue
        array = tensor.float().numpy()
        name = name.replace("transformer.", "")
        if not name.startswith("h."):
            result[OTHER[name]] = array
            continue
        _, layer, part = name.split(".", 2)
        if part.startswith(("attn.", "mlp.c_")):
            array = array.T
        if part == "attn.c_attn.weight":
            hidden, heads = config["n_embd"], config["n_head"]
            size, each = hidden // heads, heads // mp
            rows = [third * hidden + head * size + i for card in range(mp) for third in range(3)
                    for head in range(card * each, (card + 1) * each) for i in range(size)]
            array = array[rows]
        if part == "mlp.c_fc.weight":
            inner, each = config["n_inner"], config["n_inner"] // mp
            rows = [half * inner + card * each + i
                    for card in range(mp) for half in range(2) for i in range(each)]
            array = array[rows]
        result[f"model.layers.{layer}.{BLOCK[part]}"] = array
    return result


@pytest.fixture
def save(tmp_path):
    """Function: name → array, saved by MindSpore as a .ckpt file, whose path it returns."""
    def save(arrays, name="mindspore.ckpt", dtype=None, **extra):
        entries = [{"name": key, "data": mindspore.Tensor(np.ascontiguousarray(array), dtype)}
                   for key, array in arrays.items()]
        mindspore.save_checkpoint(entries, str(tmp_path / name), append_dict=extra or None)
        return tmp_path / name
    return save


@pytest.mark.parametrize("mp", [1, 2, 4])
def test_reference(reference, tmp_path, load_official, canonical_of, bits, save, mp):
    config, state = json.loads((reference / "config.json").read_text()), load_official(reference)
    path = save(to_mindformers(config, state, mp))
    mindformers_to_ms(path, reference / "config.json", tmp_path / "ms", mp=mp)
    reader = CheckpointReader(tmp_path / "ms")
    reader.check(parameter_shapes(reader.config))
    for name, tensor in canonical_of(config, state).items():
        assert bits(reader.read(name)) == bits(tensor), name
    assert json.loads((tmp_path / "ms/config.json").read_text()) == config


def test_another_mp_gives_another_model(tmp_path, make_official, save):
    """So that the test above means something: the number of cards matters for both fused weights."""
    config, state = make_official("52b", heads=4)
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = save(to_mindformers(config, state, 4))
    mindformers_to_ms(path, tmp_path, tmp_path / "right", mp=4)
    mindformers_to_ms(path, tmp_path, tmp_path / "wrong", mp=2)
    right, wrong = CheckpointReader(tmp_path / "right"), CheckpointReader(tmp_path / "wrong")
    differ = {name.rsplit(".", 2)[-2] for name in right.names
              if not np.array_equal(right.read(name), wrong.read(name))}
    assert differ == {"query", "key_value", "gate_proj", "up_proj"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_and_sizes_equal_the_torch_road(tmp_path, make_official, write_official, bits, save,
                                                     dtype):
    config, state = make_official("52b", hidden=24, heads=6, layers=3, inner=18, dtype=dtype)
    source = write_official(config, state)
    (source / "tokenizer.model").write_text("tokens")
    torch_to_ms(source, tmp_path / "torch")
    path = save(to_mindformers(config, state, 3), dtype=getattr(mindspore, dtype))
    mindformers_to_ms(path, source, tmp_path / "ms", mp=3)
    one, other = CheckpointReader(tmp_path / "torch"), CheckpointReader(tmp_path / "ms")
    assert one.names == other.names
    for name in one.names:
        assert bits(one.read(name)) == bits(other.read(name))
    assert (tmp_path / "ms/tokenizer.model").read_text() == "tokens"
    mindformers_to_ms(path, source, tmp_path / "cast", mp=3, dtype="float32")
    assert np.array_equal(CheckpointReader(tmp_path / "cast").read("lm_head.weight"),
                          state["lm_head.weight"].float().numpy())


def test_training_state_is_ignored_and_the_unknown_is_not(tmp_path, make_official, canonical_of, bits, save):
    config, state = make_official("12b")
    (tmp_path / "config.json").write_text(json.dumps(config))
    arrays = to_mindformers(config, state, 1)
    moments = {f"{prefix}.{name}": array for prefix in ("adam_m", "adam_v", "accu_grads")
               for name, array in arrays.items()}
    counters = {"global_step": np.zeros(1, np.int32), "scale_sense": np.float32(2),
                "current_iterator_step": np.int32(1), "last_overflow_iterator_step": np.int32(0),
                "model.layers.0.attention.infer_attention.paged_attention_mgr.key_cache": np.zeros((2, 2))}
    path = save({**moments, **arrays, **counters}, epoch_num=1, step_num=7, learning_rate=0.5)
    mindformers_to_ms(path, tmp_path / "config.json", tmp_path / "ms")
    reader = CheckpointReader(tmp_path / "ms")
    for name, tensor in canonical_of(config, state).items():
        assert bits(reader.read(name)) == bits(tensor)

    path = save({**arrays, "model.layers.0.attention.lora_a": np.zeros(2, np.float32)})
    with pytest.raises(InputError, match="1 not expected: model.layers.0.attention.lora_a"):
        mindformers_to_ms(path, tmp_path / "config.json", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_missing_and_wrong_shapes_are_listed(tmp_path, make_official, save):
    config, state = make_official("52b")
    (tmp_path / "config.json").write_text(json.dumps(config))
    arrays = to_mindformers(config, state, 1)
    del arrays["model.layers.1.attention.w_qkv.weight"]
    arrays["model.norm_out.weight"] = arrays["model.norm_out.weight"][:5]
    with pytest.raises(InputError) as error:
        mindformers_to_ms(save(arrays), tmp_path, tmp_path / "ms")
    assert "1 missing: model.layers.1.attention.w_qkv.weight" in str(error.value)
    assert "model.norm_out.weight is (5,) and must be (48,)" in str(error.value)
    assert not (tmp_path / "ms").exists()


@pytest.mark.parametrize("mp, message", [
    (2, "mp 2 does not divide n_head 3"), (3, "mp 3 does not divide ffn_hidden_size 40"),
    (0, "mp must be a positive"), ("4", "mp must be a positive")])
def test_mp_out_of_range(tmp_path, make_official, save, mp, message):
    config, state = make_official("52b")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        mindformers_to_ms(save(to_mindformers(config, state, 1)), tmp_path, tmp_path / "ms", mp=mp)


def test_broken_and_absent_files(tmp_path, make_official, save):
    config, state = make_official("12b")
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = save(to_mindformers(config, state, 1))
    content = path.read_bytes()
    for keep in (0, 7, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(InputError, match="ckpt cannot be read as a MindSpore checkpoint") as error:
            mindformers_to_ms(path, tmp_path, tmp_path / "ms")
        assert "\n" not in str(error.value)
    for absent in (tmp_path / "nothing.ckpt", tmp_path):
        with pytest.raises(InputError, match="is not a file; give one .ckpt file"):
            mindformers_to_ms(absent, tmp_path, tmp_path / "ms")
    assert not os.path.exists(tmp_path / "ms")
