"""One operator for a whole model: from tokens, new ones or a prompt's, to the logits of those that follow."""

import ctypes

import mindspore as ms
import numpy as np

from telechat.nn.cpu.build import load_library

TYPES = {ms.float32: 0, ms.bfloat16: 1}  # of weights, as the operator numbers them


class _Sizes(ctypes.Structure):
    """DecodeSizes in decode.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "layers", "hidden", "heads", "key_value_heads", "head_dim",
                                                    "inner", "vocabulary", "block_size", "table_width", "outputs", "type",
                                                    "rank")]
    _fields_ += [(name, ctypes.c_float) for name in ("epsilon", "input_mult", "logits_scale")]


class _Quantisation(ctypes.Structure):
    """Quantisation in quantised.h."""

    _fields_ = [("scales", ctypes.c_void_p), ("order", ctypes.c_void_p), ("groups", ctypes.c_int64), ("bits", ctypes.c_int64)]


_PRODUCTS = (1, 2, 3, 6, 7, 8)  # places of a block's products in `Block.weights`


class DecodeStep:
    """A model whose weights are all here, over a cache in blocks.

    What a token gets does not depend on which others are computed in the same call, to the bit.

    Args:
        config (TeleChatConfig): its sizes.
        slopes (array): ALiBi's, float32 (heads,), or None.
    """

    def __init__(self, config, slopes):
        self.config = config
        self.slopes = slopes
        self._decode = load_library().decode
        self._decode.restype = None

    def __call__(self, table, sequences, tokens, positions, rotation, outputs, embedding, norm, head, blocks, caches,
                 adapters=None):
        """Write tokens to the cache, all of them, then let each look at its sequence up to itself.

        Addresses are asked for at every call: a Parameter may have been given another tensor.

        Args:
            table (array): int32 (sequences, blocks), which blocks hold each sequence, in order.
            sequences, tokens, positions (list): of each token its row of ``table``, its id and its position; those of
                a sequence stand together and rise.
            rotation (tuple): the tokens' cos and sin, float32 arrays (N, D), or None where ALiBi is used.
            outputs (list): which of the tokens logits are wanted of.
            embedding, norm, head (Tensor): weights (V, H), (H,), (V, H); all weights of one dtype.
            blocks (list): for each layer what `Block.weights` gives.
            caches (list): for each layer keys and values, float32 (blocks, m, block size, D).
            adapters (tuple): which columns of LoRA's factors each token takes, float32 (N, R) of 0 and 1, and for each
                layer A and B of its six products, float32 (R, inputs) and (outputs, R), None for none; None: no token
                has an adapter.

        Returns:
            array: float32 (len(outputs), V).
        """
        config, dim = self.config, self.config.head_dim
        shape = caches[0][0].shape
        sizes = _Sizes(len(tokens), len(blocks), config.hidden_size, config.n_head, config.num_key_value_heads, dim,
                       config.ffn_hidden_size, head.shape[0], shape[2], table.shape[1], len(outputs),
                       TYPES[embedding.dtype], 0 if adapters is None else adapters[0].shape[1],
                       config.layer_norm_epsilon, config.input_mult, config.logits_scale)
        columns, factors = adapters or (None, [])
        columns = None if columns is None else np.ascontiguousarray(columns, np.float32)
        factors = [_address(factor) for layer in factors for factor in layer]
        quantised = (_Quantisation * (len(_PRODUCTS) * len(blocks)))(*(_quantisation(block[place]) for block in blocks
                                                                       for place in _PRODUCTS))
        addresses = [_address(tensor) for block, pair in zip(blocks, caches) for tensor in (*block, *pair)]
        logits = np.empty((len(outputs), head.shape[0]), np.float32)
        whole = [np.ascontiguousarray(array, np.int32) for array in (sequences, table, tokens, positions)]
        cos_sin = (None, None) if rotation is None else [np.ascontiguousarray(part, np.float32) for part in rotation]
        outputs = np.ascontiguousarray(outputs, np.int32)
        self._decode(ctypes.byref(sizes), *map(_pointer, (*whole, *cos_sin, self.slopes, outputs)),
                     *(ctypes.c_void_p(_address(tensor)) for tensor in (embedding, norm, head)),
                     (ctypes.c_void_p * len(addresses))(*addresses), quantised, _pointer(columns),
                     (ctypes.c_void_p * len(factors))(*factors), _pointer(logits))
        return logits


def _address(tensor):
    """Of a tensor, or of a quantised weight's packed values."""
    tensor = tensor[0] if isinstance(tensor, tuple) else tensor
    return None if tensor is None else tensor.data_ptr()


def _quantisation(weight):
    if not isinstance(weight, tuple):
        return _Quantisation()
    packed, scales, *order = weight
    bits = 8 if packed.dtype == ms.int8 else 4
    return _Quantisation(scales.data_ptr(), order[0].data_ptr() if order else None, scales.shape[1], bits)


def _pointer(array):
    return ctypes.c_void_p(None if array is None else array.ctypes.data)
