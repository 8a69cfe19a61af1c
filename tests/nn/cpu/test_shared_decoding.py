"""The decoding operator cut over processes, here threads of one, against the whole: plan.py's slices of every weight."""

import concurrent.futures
import mmap

import numpy as np
import pytest
from mindspore import Tensor

from telechat import TeleChat
from telechat.nn.alibi import alibi_slopes
from telechat.nn.cpu.build import load_library
from telechat.nn.positions import decoding_tables
from telechat.parallel.plan import local_slices, vocabulary_rows
from tests.test_model import small_config

if load_library() is None:
    pytest.skip("needs a C++ compiler, which is not here", allow_module_level=True)

from telechat.nn.cpu.decoding import DecodeStep, shared_bytes

BLOCK = ("input_layernorm.weight", "self_attention.query.weight", "self_attention.key_value.weight",
         "self_attention.dense.weight", "self_attention.dense.bias", "post_attention_layernorm.weight",
         "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "mlp.down_proj.bias")
SEQUENCES, TOKENS, POSITIONS = [0, 0, 0, 1, 1], [5, 90, 3, 96, 41], [0, 1, 2, 0, 1]
CASES = {"tied": dict(tie_word_embeddings=True), "alibi": dict(position_embedding="alibi", input_mult=2.0, output_mult=0.5)}


class Process:
    """What one of ``size`` processes has of a model, over a cache of its own."""

    def __init__(self, model, rank, size, memory):
        config = model.config
        arrays = {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}

        def part(name):
            array = arrays[name][local_slices(name, arrays[name].shape, rank, size)]
            if name.endswith(("word_embeddings.weight", "lm_head.weight")):
                array = np.pad(array, ((0, vocabulary_rows(config, size) - len(array)), (0, 0)))
            return Tensor(np.ascontiguousarray(array))

        head = "lm_head.weight" if "lm_head.weight" in arrays else "transformer.word_embeddings.weight"
        self.ends = part("transformer.word_embeddings.weight"), part("transformer.ln_f.weight"), part(head)
        self.blocks = [[part(f"transformer.h.{layer}.{name}") for name in BLOCK] for layer in range(config.n_layer)]
        shape = (3, config.num_key_value_heads // size, 4, config.head_dim)
        self.caches = [[Tensor(np.zeros(shape, np.float32)) for _ in range(2)] for _ in range(config.n_layer)]
        self.tables, slopes = decoding_tables(config, 8), None
        if config.position_embedding == "alibi":
            heads = config.n_head // size
            self.tables, slopes = None, alibi_slopes(config.n_head)[rank * heads:(rank + 1) * heads]
        self.step = DecodeStep(config, slopes, None if size == 1 else (memory, rank, size))

    def decode(self, rows):
        """Logits of some of the tokens."""
        sequences, tokens, positions = ([values[row] for row in rows] for values in (SEQUENCES, TOKENS, POSITIONS))
        rotation = None if self.tables is None else [table[positions] for table in self.tables]
        return self.step(np.array([[1], [2]], np.int32), sequences, tokens, positions, rotation, range(len(rows)), *self.ends,
                         self.blocks, self.caches)


def logits_of(model, size, calls):
    """What each of ``size`` processes gets for some calls, one behind the other: (size, tokens, V)."""
    memory = mmap.mmap(-1, shared_bytes(size))
    processes = [Process(model, rank, size, memory) for rank in range(size)]
    with concurrent.futures.ThreadPoolExecutor(size) as pool:
        return np.stack(list(pool.map(lambda process: np.concatenate([process.decode(rows) for rows in calls]), processes)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_processes_get_the_logits_of_one(case, size):
    """97 tokens, which neither 2 nor 4 divides; alone or together a token gets the same bits, on all processes."""
    model = TeleChat(small_config(vocab_size=97, num_key_value_heads=4, initializer_range=0.3, **CASES[case]), kernels="cpu")
    alone, = logits_of(model, 1, [range(5)])
    together = logits_of(model, size, [range(5)])
    assert np.abs(together[0] - alone).max() < 1e-5 * np.abs(alone).max()
    for logits in together:
        np.testing.assert_array_equal(logits, together[0])
    one_by_one = logits_of(model, size, [[row] for row in range(5)])
    np.testing.assert_array_equal(one_by_one, together)


def test_what_is_larger_than_the_shared_memory_is_added_up_in_parts():
    """70,000 logits, of which 65,536 are added up at a time."""
    model = TeleChat(small_config(vocab_size=70_001, n_layer=1, hidden_size=16, ffn_hidden_size=16, n_head=2,
                                  num_key_value_heads=2), kernels="cpu")
    alone, together = (logits_of(model, size, [[0]])[0] for size in (1, 2))
    assert np.abs(together - alone).max() < 1e-5 * np.abs(alone).max()
