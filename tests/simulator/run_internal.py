"""Runs MindSpore's internal kernels in a graph on the simulated card: run_internal.py INPUTS.npz RESULTS.npz

Inputs and results are named KERNEL_argument; a refusal is stored as KERNEL_error.
"""

import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import auto_generate

HEADS, KV_HEADS, BATCH = 4, 2, 2


class Paged(nn.Cell):
    """Writes a token of each sequence into the caches, then attends."""

    def __init__(self, dim):
        super().__init__()
        self.write = auto_generate.ReshapeAndCache()
        self.attend = auto_generate.PagedAttention(HEADS, dim**-0.5, KV_HEADS)

    def construct(self, query, key, value, key_cache, value_cache, slots, table, batch_valid_length):
        written = self.write(key, value, key_cache, value_cache, slots)
        return self.attend(ops.depend(query, written), key_cache, value_cache, table, batch_valid_length)


class Simple(nn.Cell):
    """One operator."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def construct(self, *arguments):
        return self.function(*arguments)


_attention = auto_generate.FlashAttentionScore(HEADS, scale_value=16**-0.5, input_layout="BSH")


def gather(table, indices):
    return ops.gather(table, indices, 0)


def norm(x, delta, weight):
    return auto_generate.add_rms_norm(x, delta, weight, 1e-5)


def flash(query, key, value):
    return _attention(query, key, value, None, None, None, None, None, None, None)[3]


FUNCTIONS = {"matmul": ops.MatMul(transpose_b=True), "gather": gather, "norm": norm,
             "rotary": auto_generate.ApplyRotaryPosEmb(2), "flash": flash}


def main(source, target):
    ms.set_device("Ascend")
    ms.set_context(mode=ms.GRAPH_MODE, jit_config={"jit_level": "O0", "infer_boost": "on"})
    inputs, results = np.load(source), {}
    for case in dict.fromkeys(name.rpartition("_")[0] for name in inputs):
        kernel, dtype = case.split(".")[:2]
        arguments = [Tensor(inputs[name]) for name in inputs if name.rpartition("_")[0] == case]
        arguments = [x.astype(getattr(ms, dtype)) if x.dtype == ms.float32 else x for x in arguments]
        arguments = [x.to("Ascend") if x.shape else x for x in arguments]
        cell = Paged(arguments[3].shape[-1]) if kernel == "paged" else Simple(FUNCTIONS[kernel])
        try:
            output = cell(*arguments)
            outputs = list(output) if isinstance(output, tuple) else [output]
            outputs += arguments[3:5] if kernel == "paged" else []
            for place, x in enumerate(outputs):
                results[f"{case}_{place}"] = x.astype(ms.float32).asnumpy()
        except Exception as error:  # noqa: BLE001 - whatever MindSpore makes of a refusal
            results[f"{case}_error"] = np.array(str(error))
    np.savez(target, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
