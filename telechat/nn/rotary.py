"""Rotary position tables with NTK extension, as each official model computes them.

Su et al., "RoFormer" (arXiv:2104.09864), in the rotate-half form; the NTK factor stretches the
base once a sequence is longer than the context C that the model was built for. Everything is
float32, operation for operation as the official torch code has it: at position 16,384 a base that
is one float32 step off already turns an angle by 1e-3.
"""

import math

import numpy as np


def ntk_alpha(length, context):
    """The factor max(2^ceil(log2(length / context) + 1) − 1, 1); 1 up to ``context``."""
    return max(2 ** math.ceil(math.log2(length / context) + 1) - 1, 1)


def rotary_tables(config, positions, length):
    """Cosines and sines at ``positions`` of a sequence that is ``length`` tokens long.

    Args:
        config (TeleChatConfig): the ``rotary_…`` fields and ``training_seqlen`` decide.
        positions (array of int, shape (S,)): token positions, 0 first.
        length (int): length of the whole sequence, which decides the NTK extension.

    Returns:
        Two float32 arrays of shape (S, head_dim); both halves of a row are equal. For 7B and 12B
        the values are float16 numbers, since the official code keeps its tables in float16.
    """
    dim = config.head_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    if config.rotary_ntk_scales_theta:
        base = config.rotary_base * ntk_alpha(length, config.rotary_ntk_context)
        scale = 1.0
    else:
        length = max(length, config.training_seqlen)
        base = config.rotary_base * ntk_alpha(length, config.rotary_ntk_context) ** (dim / (dim - 2))
        scale = 0.1 * math.log(length / config.training_seqlen) + 1.0
    frequencies = np.float32(1.0) / _pow(base, exponents)
    angles = np.asarray(positions, np.float32)[:, None] * frequencies
    angles = np.concatenate([angles, angles], axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    if config.rotary_float16:
        cos, sin = cos.astype(np.float16), sin.astype(np.float16)
    return (cos * cos.dtype.type(scale)).astype(np.float32), (sin * sin.dtype.type(scale)).astype(np.float32)


def _pow(base, exponents):
    """float32 base to float32 exponents, rounded once from float64, as torch's pow comes out."""
    return np.power(np.float64(np.float32(base)), exponents.astype(np.float64)).astype(np.float32)
