"""GPTQ's layout written and read by plain loops, apart from the library's code."""

import numpy as np


def round_to_nearest(weight, bits, group):
    """(q, scales) of a weight (out, in): q (in, out) from 0 to 2^bits − 1 around 2^(bits−1), scales float16 (groups, out)."""
    outputs, inputs = weight.shape
    most = 2 ** (bits - 1) - 1
    q, scales = np.zeros((inputs, outputs), np.int64), np.zeros((-(-inputs // group), outputs), np.float16)
    for g in range(len(scales)):
        part = weight[:, g * group:(g + 1) * group].astype(np.float64)
        scales[g] = np.abs(part).max(1) / most
        q[g * group:(g + 1) * group] = np.clip(np.rint(part.T / scales[g].astype(np.float64)), -most - 1, most) + most + 1
    return q, scales


def packed_down(values, bits):
    """Whole numbers (rows, columns) → int32 words, ``32 / bits`` rows of a column in each."""
    count = 32 // bits
    words = np.zeros((len(values) // count, values.shape[1]), np.uint64)
    for place in range(count):
        words |= values[place::count].astype(np.uint64) << np.uint64(bits * place)
    return words.astype(np.uint32).view(np.int32)


def tensors(q, scales, bits, g_idx):
    """The four tensors of a product."""
    zeros = np.full(scales.shape, 2 ** (bits - 1) - 1)
    return {"qweight": packed_down(q, bits), "qzeros": packed_down(zeros.T, bits).T.copy(), "scales": scales,
            "g_idx": np.asarray(g_idx, np.int32)}


def read(parts, bits):
    """The weight, float32 (out, in), of the four tensors of a product."""
    count, mask = 32 // bits, 2 ** bits - 1
    qweight, qzeros = (parts[name].view(np.uint32).astype(np.int64) for name in ("qweight", "qzeros"))
    inputs, outputs = qweight.shape[0] * count, qweight.shape[1]
    weight = np.zeros((outputs, inputs), np.float32)
    for i in range(inputs):
        group = parts["g_idx"][i]
        q = (qweight[i // count] >> bits * (i % count)) & mask
        z = np.array([(qzeros[group, o // count] >> bits * (o % count)) & mask for o in range(outputs)]) + 1
        weight[:, i] = parts["scales"][group].astype(np.float32) * (q - z).astype(np.float32)
    return weight
