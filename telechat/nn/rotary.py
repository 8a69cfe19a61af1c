"""Rotary position tables with NTK extension or YaRN, as each official model computes them.

Su et al., "RoFormer" (arXiv:2104.09864), in the rotate-half form; the NTK factor stretches the
base once a sequence is longer than the context C that the model was built for, YaRN (arXiv:2309.00071)
stretches the low frequencies whatever the sequence's length. Everything is float32, operation for operation as the official torch code has it: at position 16,384 a base that
is one float32 step off already turns an angle by 1e-3.
"""

import math

import numpy as np


def ntk_alpha(length, context):
    """The factor max(2^ceil(log2(length / context) + 1) − 1, 1); 1 up to ``context``."""
    return max(2 ** math.ceil(math.log2(length / context) + 1) - 1, 1)


def yarn_frequencies(config):
    """TeleChat3's inverse frequencies, float32 (head_dim / 2,), and the factor of its cosines and sines.

    With o the original and s = max_position_embeddings / o the stretched context, a frequency that turns more than
    beta_fast times within o stays, one that turns less than beta_slow times is divided by s, and a linear ramp over
    the dimensions lies between. The file's own ``factor`` is not used, as in the official code.
    """
    dim, yarn = config.head_dim, config.yarn
    original = yarn.original_max_position_embeddings
    stretch = config.training_seqlen / original

    def dimension(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rotary_base))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), dim - 1)
    if low == high:
        high += 0.001  # no division by 0
    powers = _pow(config.rotary_base, _exponents(dim))
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    stays = np.float32(1) - np.clip(ramp, 0, 1)
    one = np.float32(1)
    frequencies = one / (np.float32(stretch) * powers) * (one - stays) + one / powers * stays
    return frequencies, 0.07 * math.log(stretch) + 1.0 if stretch > 1 else 1.0


def fixed_tables_length(config):
    """The length of a sequence up to which its tables do not depend on it; infinity where they never do."""
    if config.rotary_ntk_context is None:
        return math.inf
    return config.rotary_ntk_context if config.rotary_ntk_scales_theta else config.training_seqlen


def rotary_tables(config, positions, length):
    """Cosines and sines at ``positions`` of a sequence that is ``length`` tokens long.

    Args:
        config (TeleChatConfig): the ``rotary_…`` fields and ``training_seqlen`` decide.
        positions (array of int, shape (S,)): token positions, 0 first.
        length (int): length of the whole sequence, which decides the NTK extension.

    Returns:
        Two float32 arrays of shape (S, head_dim); both halves of a row are equal. With
        ``rotary_float16`` the values are float16 numbers, since the official code keeps its tables so.
    """
    frequencies, scale = _frequencies(config, length)
    angles = np.asarray(positions, np.float32)[:, None] * frequencies
    angles = np.concatenate([angles, angles], axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    if not config.rotary_float16:
        return cos * np.float32(scale), sin * np.float32(scale)
    # Rounded, multiplied in float32 and rounded again, as torch multiplies a float16 tensor by a number.
    rounded = (np.float16(table).astype(np.float32) * np.float32(scale) for table in (cos, sin))
    return tuple(np.float16(table).astype(np.float32) for table in rounded)


def _frequencies(config, length):
    """Inverse frequencies, float32 (head_dim / 2,), of a sequence of ``length`` tokens, and the tables' factor."""
    dim = config.head_dim
    base, scale = config.rotary_base, 1.0
    if config.yarn is not None:
        return yarn_frequencies(config)
    if config.rotary_ntk_scales_theta:
        base *= ntk_alpha(length, config.rotary_ntk_context)
    elif config.rotary_ntk_context is not None:
        length = max(length, config.training_seqlen)
        base *= ntk_alpha(length, config.rotary_ntk_context) ** (dim / (dim - 2))
        scale = 0.1 * math.log(length / config.training_seqlen) + 1.0
    return np.float32(1.0) / _pow(base, _exponents(dim)), scale


def _exponents(dim):
    return np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)


def _pow(base, exponents):
    """float32 base to float32 exponents, rounded once from float64, as torch's pow comes out."""
    return np.power(np.float64(np.float32(base)), exponents.astype(np.float64)).astype(np.float32)
