"""The compiled graphs of a block's two halves, attention and feed-forward layer, in training.

Each is compiled once and used for every layer, with the weights as arguments: compile time does not
grow with depth, and between the forward and the backward pass only the inputs of the products are
kept, and by operators that give it the logarithm of each row's sum. Weights are handed over as ``parameter.data``:
a Parameter argument would compile anew for each layer. A product's gradient does not need the
product's result, so in a backward pass the compiler drops every forward product but that of scores to
be made again; what is computed twice is the cheap rest (norms, SwiGLU, a longer sequence's softmax).

With an adapter (``lora``, a row of tensors behind the weights: lora.py) the weights are frozen: a backward pass gives the
gradients of the adapter's tensors in the place of theirs, and the compiler drops the products that made those.
"""

import mindspore as ms
from mindspore import nn, ops

from telechat.nn.graphs import Accumulate
from telechat.nn.lora import trained

gradient = ops.GradOperation(get_all=True, sens_param=True)


def with_bias(gradients, bias, place):
    """The gradient at ``place`` in a tuple, or nothing: None arguments, so absent biases, have no gradient."""
    return () if bias is None else (gradients[place],)


def place_after(place, *optional):
    """The place behind so many arguments, of which the ``optional`` ones that are None have no gradient."""
    for argument in optional:
        place = place if argument is None else place + 1
    return place


class Attention(nn.Cell):
    """The first half: norm, attention, output product, added to the residual. All scores are made at once."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def construct(self, *arguments):
        """`forward`, and in the place of sums that there are not: None."""
        middle, q, k, v, attended, *log_sums = self.forward(*arguments)
        return middle, q, k, v, log_sums[0] if log_sums else None, attended

    @ms.jit
    def forward(self, x, cos, sin, mask, position_bias, segment_ids, drop_attention, drop_dense,
                norm, query, key_value, dense, dense_bias, *lora):
        """x (rows, H) → the same behind attention, and what `backward` starts from, the sums at the end if any.

        A graph that returned a None would send that to a card, and wait for it.
        """
        f = self.functions
        of_qkv, of_dense = f.cut_attention(lora)
        q, k, v = f.heads(*f.project_qkv(x, norm, query, key_value, *of_qkv), cos, sin)
        attended, log_sums = f.kernels.attention_in_training(q, k, v, mask, position_bias, segment_ids, f.scale,
                                                             drop_attention)
        results = f.project_attention(x, attended, dense, dense_bias, drop_dense, *of_dense), q, k, v, attended
        return results if log_sums is None else results + (log_sums,)

    @ms.jit
    def backward(self, dmiddle, x, q, k, v, log_sums, attended, cos, sin, mask, position_bias, segment_ids, drop_attention,
                 drop_dense, norm, query, key_value, dense, dense_bias, *lora):
        """The result's gradient → those of x, norm, query, key_value, dense and, where there is one, its bias.

        With an adapter those of x and of the adapter's tensors.
        """
        f = self.functions
        of_qkv, of_dense = f.cut_attention(lora)
        dense_grads = gradient(f.project_attention)(x, attended, dense, dense_bias, drop_dense, *of_dense, dmiddle)
        dheads = f.kernels.attention_backward(dense_grads[1], attended, q, k, v, log_sums, mask, position_bias, segment_ids,
                                              f.scale, drop_attention)
        qkv_grads = gradient(f.project_qkv)(x, norm, query, key_value, *of_qkv, f.heads_backward(*dheads, cos, sin))
        if f.lora is not None:
            return (dense_grads[0] + qkv_grads[0], *trained(qkv_grads, 4, of_qkv),
                    *trained(dense_grads, place_after(3, dense_bias, drop_dense), of_dense))
        return (dense_grads[0] + qkv_grads[0], qkv_grads[1], qkv_grads[2], qkv_grads[3],
                dense_grads[2], *with_bias(dense_grads, dense_bias, 3))


class FeedForward(nn.Cell):
    """The second half: norm, gated feed-forward layer, added to the residual.

    Many rows go chunk by chunk (`Kernels.rows_at_once`), which bounds the memory of what is several times
    as wide as the residual.
    """

    def __init__(self, functions):
        super().__init__()
        self.functions = functions
        self.add = Accumulate(functions.kernels)

    def construct(self, middle, drop, *weights, masks=()):
        """middle (rows, H) → the block's output; and (gate, up) of each chunk, for `backward`.

        masks: of the dropout of an adapter, whose other tensors are the last of ``weights``.
        """
        chunks = zip(self.chunks(middle), self.chunks(drop, like=middle), self.chunks_of_all(masks, middle))
        outputs, *kept = zip(*(self.forward_rows(*chunk, *weights, *mask_rows) for *chunk, mask_rows in chunks))
        return joined(outputs), list(zip(*kept))

    def backward(self, dy, middle, kept, drop, *weights, masks=()):
        """The output's gradient → those of middle, norm, gate, up, down and, where there is one, its bias.

        With an adapter those of middle and of the adapter's tensors. kept: as `construct` gave it, or None to compute
        gate and up again; masks: as there.
        """
        chunks = zip(self.chunks(dy), self.chunks(middle), self.chunks(drop, like=middle), self.chunks_of_all(masks, middle))
        dmiddles, sums = [], None
        for number, (dy_rows, rows, drop_rows, mask_rows) in enumerate(chunks):
            gate_up = (None, None) if kept is None else kept[number]
            dmiddle, *gradients = self.backward_rows(dy_rows, rows, *gate_up, drop_rows, *weights, *mask_rows)
            dmiddles.append(dmiddle)
            sums = gradients if sums is None or not gradients else self.add(*sums, *gradients)
        return joined(dmiddles), *sums

    def chunks_of_all(self, tensors, like):
        """For each chunk of ``like`` those of all tensors."""
        if not tensors:
            return [()] * len(self.chunks(None, like))
        return list(zip(*(self.chunks(tensor, like) for tensor in tensors)))

    def chunks(self, x, like=None):
        """x, or as many None as ``like`` has chunks, in chunks of rows."""
        rows = (x if like is None else like).shape[0]
        size = self.functions.kernels.rows_at_once or rows
        if x is None:
            return [None] * -(-rows // size)
        return [x] if rows <= size else [x[start:start + size].contiguous() for start in range(0, rows, size)]

    @ms.jit
    def forward_rows(self, middle, drop, norm, gate, up, down, down_bias, *lora):
        """The block's output, gate and up for a chunk of rows."""
        f = self.functions
        of_gate_up, of_down = f.cut_feed_forward(lora)
        g, u = f.project_gate_up(middle, norm, gate, up, *of_gate_up)
        return f.project_down(middle, g, u, down, down_bias, drop, *of_down), g, u

    @ms.jit
    def backward_rows(self, dy, middle, g, u, drop, norm, gate, up, down, down_bias, *lora):
        """`backward` for a chunk of rows; g and u None: computed again."""
        f = self.functions
        of_gate_up, of_down = f.cut_feed_forward(lora)
        if g is None:
            g, u = f.project_gate_up(middle, norm, gate, up, *of_gate_up)
        down_grads = gradient(f.project_down)(middle, g, u, down, down_bias, drop, *of_down, dy)
        gate_grads = gradient(f.project_gate_up)(middle, norm, gate, up, *of_gate_up, (down_grads[1], down_grads[2]))
        if f.lora is not None:
            return (down_grads[0] + gate_grads[0], *trained(gate_grads, 4, of_gate_up),
                    *trained(down_grads, place_after(4, down_bias, drop), of_down))
        return (down_grads[0] + gate_grads[0], gate_grads[1], gate_grads[2], gate_grads[3],
                down_grads[3], *with_bias(down_grads, down_bias, 4))


def joined(chunks):
    """Chunks of rows in one tensor."""
    return chunks[0] if len(chunks) == 1 else ops.concat(chunks, 0)
