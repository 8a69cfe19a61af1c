"""One operator for a whole model's decoding step: from the newest tokens to the logits of those that follow."""

import ctypes

import mindspore as ms
import numpy as np

from telechat.nn.cpu.build import load_library

TYPES = {ms.float32: 0, ms.bfloat16: 1}  # of weights, as the operator numbers them


class _Sizes(ctypes.Structure):
    """DecodeSizes in decode.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "layers", "hidden", "heads", "key_value_heads", "head_dim",
                                                    "inner", "vocabulary", "capacity", "type")]
    _fields_ += [(name, ctypes.c_float) for name in ("epsilon", "input_mult", "logits_scale")]


class DecodeStep:
    """The decoding step of a model whose weights are all here.

    Args:
        config (TeleChatConfig): its sizes.
        tables (tuple): cos and sin, float32 arrays (positions, D), or None where ALiBi is used.
        slopes (array): ALiBi's, float32 (heads,), or None.
    """

    def __init__(self, config, tables, slopes):
        self.config = config
        self.cos, self.sin = (None, None) if tables is None else map(np.ascontiguousarray, tables)
        self.slopes = slopes
        self._decode = load_library().decode
        self._decode.restype = None

    def __call__(self, slots, tokens, positions, embedding, norm, head, blocks, caches):
        """Write each sequence's newest token to its cache and look at all of the sequence.

        Addresses are asked for at every call: a Parameter may have been given another tensor.

        Args:
            slots, tokens, positions (list): of each sequence its place in the caches, newest token and its position.
            embedding, norm, head (Tensor): weights (V, H), (H,), (V, H); all weights of one dtype.
            blocks (list): for each layer the tensors of `Block.weights`.
            caches (list): for each layer keys and values, float32 (slots, m, T, D).

        Returns:
            array: float32 (B, V).
        """
        config, capacity = self.config, caches[0][0].shape[2]
        sizes = _Sizes(len(tokens), len(blocks), config.hidden_size, config.n_head, config.num_key_value_heads,
                       config.head_dim, blocks[0][6].shape[0], head.shape[0], capacity, TYPES[embedding.dtype],
                       config.layer_norm_epsilon, config.input_mult, config.logits_scale)
        addresses = [_address(tensor) for block, pair in zip(blocks, caches) for tensor in (*block, *pair)]
        logits = np.empty((len(tokens), head.shape[0]), np.float32)
        arrays = [np.ascontiguousarray(array, np.int32) for array in (slots, tokens, positions)]
        self._decode(ctypes.byref(sizes), *map(_pointer, (*arrays, self.cos, self.sin, self.slopes)),
                     *(ctypes.c_void_p(_address(tensor)) for tensor in (embedding, norm, head)),
                     (ctypes.c_void_p * len(addresses))(*addresses), _pointer(logits))
        return logits


def _address(tensor):
    return None if tensor is None else tensor.data_ptr()


def _pointer(array):
    return ctypes.c_void_p(None if array is None else array.ctypes.data)
