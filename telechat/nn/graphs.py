"""The compiled graphs of a training step around the blocks', which block_graphs.py holds."""

import mindspore as ms
from mindspore import nn, ops

from telechat.nn.block import Unchanged

_gradient = ops.GradOperation(get_all=True, sens_param=True)


class Embed(nn.Cell):
    """Token embedding (muP's multiplier and dropout included), and its gradient.

    The forward pass is not compiled: it is one gather, and bfloat16 has none in a CPU graph.
    """

    def __init__(self, config, dtype, kernels):
        super().__init__()
        self.kernels = kernels
        self.input_mult = config.input_mult
        self.dtype = dtype

    def construct(self, input_ids, dropout, weight):
        return self.scaled(self.kernels.embedding(input_ids, weight, self.dtype), dropout)

    @ms.jit
    def backward(self, dx, input_ids, dropout, weight):
        """dx (N, H) → the gradient of ``weight`` (V, H)."""
        return self.kernels.embedding_gradient(self.scaled(dx, dropout), input_ids, weight)

    def scaled(self, x, dropout):
        """muP's multiplier and dropout; its own transpose, so the gradient takes the same way back."""
        if self.input_mult != 1:
            x = x * self.input_mult
        return x if dropout is None else x * dropout.astype(x.dtype)


class HeadLoss(nn.Cell):
    """Final norm, head and cross entropy over the rows that count.

    The logits are the largest tensor of a training step, so they are made for a fixed number of
    rows at a time, and only for rows whose label counts.

    Attributes:
        takes_all (bool): whether `backward` may be given all rows at once (`Kernels.head_loss`).
    """

    def __init__(self, config, kernels):
        super().__init__()
        self.kernels = kernels
        self.epsilon = config.layer_norm_epsilon
        self.scale = config.logits_scale
        self.copy_to = Unchanged()  # as in a block: what stands before a product
        self.takes_all = kernels.has_head_loss

    def normed(self, x, norm):
        """x (R, H), norm (H,) → what the head multiplies, (R, H)."""
        return self.copy_to(self.kernels.rms_norm(x, norm, self.epsilon))

    def logits(self, x, norm, head):
        """x (R, H), norm (H,), head (V, H) → (R, V)."""
        logits = self.kernels.linear(self.normed(x, norm), head)
        return logits if self.scale == 1 else logits * self.scale

    def cross_entropy(self, logits, labels, weights):
        """Weighted losses (R,) and the gradient of their sum in the logits (R, V), both float32."""
        return self.kernels.token_cross_entropy(logits, labels, weights)

    @ms.jit
    def construct(self, x, rows, labels, weights, norm, head):
        """Weighted losses of x's ``rows``, float32 (R,), without gradients."""
        logits = self.logits(ops.gather(x, rows, 0), norm, head)
        return self.cross_entropy(logits, labels, weights)[0]

    @ms.jit
    def backward(self, x, rows, labels, weights, norm, head):
        """The weighted losses (R,), and the gradients of their sum in x, norm and head, the latter in float32.

        x (N, H); rows, labels int32 (R,); weights float32 (R,): 0 for a row that only fills up.
        """
        losses, dx, dnorm, dhead = self.with_gradients(x, rows, labels, weights, norm, head)
        return losses, dx, dnorm, dhead.astype(ms.float32)

    def with_gradients(self, x, rows, labels, weights, norm, head):
        """As `backward`, in a graph that is already there; the head's gradient in its own dtype."""
        hidden = ops.gather(x, rows, 0)
        if self.takes_all:
            losses, dnormed, dhead = self.kernels.head_loss(self.normed(hidden, norm), head, labels, weights, self.scale)
            dhidden, dnorm = _gradient(self.normed)(hidden, norm, dnormed)
            return losses, ops.unsorted_segment_sum(dhidden, rows, x.shape[0]), dnorm, dhead
        losses, dlogits = self.cross_entropy(self.logits(hidden, norm, head), labels, weights)
        dhidden, dnorm, dhead = _gradient(self.logits)(hidden, norm, head, dlogits.astype(x.dtype))
        return losses, ops.unsorted_segment_sum(dhidden, rows, x.shape[0]), dnorm, dhead


class FrozenHeadLoss(nn.Cell):
    """The loss of a `HeadLoss` whose weights are frozen.

    Args:
        head_loss (HeadLoss): what computes.
    """

    def __init__(self, head_loss):
        super().__init__()
        self.head_loss = head_loss

    @ms.jit
    def backward(self, x, rows, labels, weights, norm, head):
        """The weighted losses and the gradient of x; arguments as of `HeadLoss.backward`."""
        whole = self.head_loss
        if whole.takes_all:
            hidden = ops.gather(x, rows, 0)
            losses, dnormed = whole.kernels.head_loss(whole.normed(hidden, norm), head, labels, weights, whole.scale, True)
            dhidden = _gradient(whole.normed)(hidden, norm, dnormed)[0]
            return losses, ops.unsorted_segment_sum(dhidden, rows, x.shape[0])
        made = whole.with_gradients(x, rows, labels, weights, norm, head)
        return made[0], made[1]


class Accumulate(nn.Cell):
    """Elementwise sums of two equally long runs of tensors, in float32: of many, a lower dtype loses the small ones.

    On a card the first run's tensors are given up: what is float32 there is added to in place.
    """

    def __init__(self, kernels):
        super().__init__()
        self.kernels = kernels

    def construct(self, *tensors):
        if self.kernels.fused:
            return self.in_place(*tensors)
        return self.in_graph(*tensors) if self.kernels.in_graphs else self.sums(*tensors)

    @ms.jit
    def in_graph(self, *tensors):
        return self.sums(*tensors)

    def sums(self, *tensors):
        half = len(tensors) // 2
        sums = ()
        for a, b in zip(tensors[:half], tensors[half:]):
            sums = sums + (a.astype(ms.float32) + b.astype(ms.float32),)
        return sums

    def in_place(self, *tensors):
        """`sums`, one operation a tensor, outside of graphs, which would hold on to what they are given."""
        half = len(tensors) // 2
        sums = [tensor.astype(ms.float32) for tensor in tensors[:half]]
        for total, tensor in zip(sums, tensors[half:]):
            total.add_(tensor)
        return sums


class SquaredNorm(nn.Cell):
    """Sums of squares of tensors (matrices or vectors), or of their rows, as one float32 vector to be added up."""

    def __init__(self, kernels):
        super().__init__()
        self.kernels = kernels

    def construct(self, *tensors):
        return self.in_graph(*tensors) if self.kernels.in_graphs else self.kernels.sums_of_squares(*tensors)

    @ms.jit
    def in_graph(self, *tensors):
        return self.kernels.sums_of_squares(*tensors)


class Update(nn.Cell):
    """AdamW in place on a group of float32 tensors.

    ``tensors`` holds all parameters, then first moments, second moments and gradients. Weight decay
    goes to those of two and more dimensions. The scalars behind ``clip`` are those of
    `Kernels.adamw_scalars`.
    """

    def __init__(self, kernels):
        super().__init__()
        self.kernels = kernels

    def construct(self, *arguments, copies=None):
        if self.kernels.fused:
            return self.update_each(*arguments)
        if self.kernels.in_graphs:
            return self.update_in_graph(*arguments)
        return self.update_each(*arguments, copies=copies)[-1]

    def update_each(self, clip, step, rate, beta1, beta2, epsilon, decay, no_decay, *tensors, copies=None):
        """What each `Kernels.adamw` gives. On a card clip may be None: gradients are taken as they are.

        There it is called outside a graph, for a card does all in one order, and Ascend's AdamW reads its scalars on the
        host. A graph has its inputs on the card and fetches each of them back, five times a parameter, waiting each time.
        copies: of each parameter what `Kernels.adamw` takes as such; None: there are none.
        """
        count = len(tensors) // 4
        return [self.kernels.adamw(tensors[i], tensors[count + i], tensors[2 * count + i], tensors[3 * count + i],
                                   clip, step, rate, beta1, beta2, epsilon, decay if tensors[i].ndim > 1 else no_decay,
                                   None if copies is None else copies[i])
                for i in range(count)]

    @ms.jit
    def update_in_graph(self, *arguments):
        return self.update(*arguments)

    def update(self, clip, *others):
        """Something that is there only when the last tensor is updated: the results chained."""
        done = clip
        for updated in self.update_each(clip, *others):
            done = ops.depend(done, updated)
        return done * clip
