"""One operator for a whole model: from tokens, new ones or a prompt's, to the logits of those that follow."""

import ctypes

import mindspore as ms
import numpy as np

from telechat.nn.block import PRODUCTS
from telechat.nn.cpu.build import load_library

TYPES = {ms.float32: 0, ms.bfloat16: 1}  # of weights, as the operator numbers them


class _Shared(ctypes.Structure):
    """Shared in shared.h."""

    _fields_ = [("memory", ctypes.c_void_p), ("rank", ctypes.c_int64), ("processes", ctypes.c_int64)]


class _Sizes(ctypes.Structure):
    """DecodeSizes in decode.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "layers", "hidden", "heads", "key_value_heads", "head_dim",
                                                    "inner", "vocabulary", "first_token", "rows", "block_size",
                                                    "table_width", "outputs", "type", "rank")]
    _fields_ += [(name, ctypes.c_float) for name in ("epsilon", "input_mult", "logits_scale")]
    _fields_ += [("shared", _Shared)]


class _Quantisation(ctypes.Structure):
    """Quantisation in quantised.h."""

    _fields_ = [("scales", ctypes.c_void_p), ("order", ctypes.c_void_p), ("groups", ctypes.c_int64), ("bits", ctypes.c_int64)]


_QUERY, _GATE = 1, 6  # places in `Block.weights`


def shared_bytes(processes):
    """Bytes of the memory through which so many processes add up what each has of a model's activations."""
    size = load_library().shared_bytes
    size.restype = ctypes.c_int64
    return size(ctypes.c_int64(processes))


class DecodeStep:
    """A model over a cache in blocks, whose weights are all here or cut over processes (telechat/parallel/plan.py).

    What a token gets does not depend on which others are computed in the same call, to the bit.

    Args:
        config (TeleChatConfig): of the whole model.
        slopes (array): ALiBi's of the heads here, float32 (heads,), or None.
        shared (tuple): memory of `shared_bytes`, writable and zeros at first, this process's rank and how many there are;
            all of them make the same calls. None: there is one.
    """

    def __init__(self, config, slopes, shared=None):
        self.config = config
        self.slopes = None if slopes is None else np.ascontiguousarray(slopes, np.float32)
        self._memory, self._rank, processes = shared or (None, 0, 1)
        address = None if shared is None else ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._shared = _Shared(address, self._rank, processes)
        self._decode = load_library().decode
        self._decode.restype = None
        self._plain = ()

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
            embedding, norm, head (Tensor): weights (V, H), (H,), (V, H), or V/processes rows of embedding and head, rounded
                up; all weights of one dtype.
            blocks (list): for each layer what `Block.weights` gives.
            caches (list): for each layer keys and values, float32 (blocks, m, block size, D); zeros at first. A block of keys
                is kept as (D, block size).
            adapters (tuple): which columns of LoRA's factors each token takes, float32 (N, R) of 0 and 1, and for each
                layer A and B of its six products, float32 (R, inputs) and (outputs, R), None for none; None: no token
                has an adapter.

        Returns:
            array: float32 (len(outputs), V).
        """
        config, dim = self.config, self.config.head_dim
        _, key_value_heads, block_size, _ = caches[0][0].shape
        sizes = _Sizes(len(tokens), len(blocks), config.hidden_size, _outputs(blocks[0][_QUERY]) // dim, key_value_heads,
                       dim, _outputs(blocks[0][_GATE]), config.vocab_size, self._rank * head.shape[0], head.shape[0],
                       block_size, table.shape[1], len(outputs), TYPES[embedding.dtype],
                       0 if adapters is None else adapters[0].shape[1],
                       config.layer_norm_epsilon, config.input_mult, config.logits_scale, self._shared)
        columns, factors = adapters or (None, [])
        columns = None if columns is None else np.ascontiguousarray(columns, np.float32)
        factors = [_address(factor) for layer in factors for factor in layer]
        addresses = [_address(tensor) for block, pair in zip(blocks, caches) for tensor in (*block, *pair)]
        logits = np.empty((len(outputs), config.vocab_size), np.float32)
        whole = [np.ascontiguousarray(array, np.int32) for array in (sequences, table, tokens, positions)]
        cos_sin = (None, None) if rotation is None else [np.ascontiguousarray(part, np.float32) for part in rotation]
        outputs = np.ascontiguousarray(outputs, np.int32)
        self._decode(ctypes.byref(sizes), *map(_pointer, (*whole, *cos_sin, self.slopes, outputs)),
                     *(ctypes.c_void_p(_address(tensor)) for tensor in (embedding, norm, head)),
                     (ctypes.c_void_p * len(addresses))(*addresses), self._quantisations(blocks), _pointer(columns),
                     (ctypes.c_void_p * len(factors))(*factors), _pointer(logits))
        return logits

    def _quantisations(self, blocks):
        """A `_Quantisation` for every product: for plain weights, zeros that are kept from call to call."""
        products = [block[place] for block in blocks for place in PRODUCTS]
        if any(isinstance(weight, tuple) for weight in products):
            return (_Quantisation * len(products))(*map(_quantisation, products))
        if len(self._plain) != len(products):
            self._plain = (_Quantisation * len(products))()
        return self._plain


def _outputs(weight):
    """Rows of a weight, which may be quantised."""
    return (weight[0] if isinstance(weight, tuple) else weight).shape[0]


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
