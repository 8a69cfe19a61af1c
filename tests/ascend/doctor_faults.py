"""Faults that the Ascend path once had, put back: each function makes one in this process, before anything is computed.

In a file of their own, since MindSpore compiles functions from their source.
"""

from mindspore import Tensor

from telechat.nn import ascend_kernels, device, dropout, graphs, inference, paged_attention
from telechat.nn.ascend import AscendKernels

_attend_paged = ascend_kernels.paged_attention


def weights_on_the_host():
    """As `Parameter(Tensor.from_numpy(…))` leaves them."""
    device.move_to_device = lambda parameter: parameter


def weights_on_the_host_unnoticed():
    """The same where nothing asks for their place: what is left is the check after an update."""
    from telechat.training import trainer

    weights_on_the_host()
    trainer.check_placement = lambda tensors: None


def kernels_for_inference_in_training():
    """infer_boost on in a process that trains."""
    import mindspore as ms

    ms.set_context(jit_config={"jit_level": "O0", "infer_boost": "on"})


def dropout_on_the_host():
    """Masks by numpy, copied to the card."""
    def attention_dropout(self, length, rate, place, heads):
        import numpy as np

        if rate == 0:
            return None
        kept = dropout.dropout_mask(length, length, rate, place, heads) > 0
        return device.device_tensor(np.packbits(kept, axis=-1, bitorder="little"))

    def output_dropout(self, length, width, rate, place, stream):
        mask = None if rate == 0 else dropout.dropout_mask(length, width, rate, place, [stream])
        return None if mask is None else device.device_tensor(mask, self.dtype).reshape(-1, width)

    AscendKernels.attention_dropout, AscendKernels.output_dropout = attention_dropout, output_dropout


def dropout_that_is_not_scaled_up():
    """What is kept stays as it is."""
    def output_dropout(self, length, width, rate, place, stream):
        return None if rate == 0 else _output_dropout(self, length, width, rate, place, stream) * (1 - rate)

    _output_dropout = AscendKernels.output_dropout
    AscendKernels.output_dropout = output_dropout


def sums_in_the_gradients_dtype():
    """Gradients of micro-batches and of the head's chunks summed in bfloat16."""
    graphs.Accumulate.in_place = lambda self, *tensors: [
        a + b for a, b in zip(tensors[:len(tensors) // 2], tensors[len(tensors) // 2:])]


def _rotate_heads_first(self, x, cos, sin):
    return ascend_kernels.rotate(x.transpose(0, 2, 1, 3), cos, sin).transpose(0, 2, 1, 3)


def rotation_with_heads_first():
    """BNSD, in which CANN takes no more heads than 8 for each token."""
    AscendKernels.rotate = _rotate_heads_first


def a_step_counted_from_one():
    """AdamW's operation counts from 0."""
    import mindspore as ms

    def adamw_scalars(updates, *others):
        return [Tensor([updates], ms.float32), *_adamw_scalars(updates, *others)[1:]]

    _adamw_scalars = ascend_kernels.adamw_scalars
    ascend_kernels.adamw_scalars = adamw_scalars


def kernels_for_inference_left_off():
    """Paged decoding without infer_boost."""
    inference.use_inference_kernels = lambda: inference._state.update(on=True)


def blocks_of_128_tokens():
    """Whatever the heads' size."""
    paged_attention.LARGEST_BLOCK = 1 << 20


def decoding_without_pages():
    """A process that was not prepared for inference."""
    inference.use_inference_kernels = lambda: None


def _attend_without_the_new_token(query, keys, values, table, lengths, scale):
    return _attend_paged(query, keys, values, table, lengths - 1, scale)


def lengths_without_the_new_token():
    """What the cache held before."""
    ascend_kernels.paged_attention = _attend_without_the_new_token
