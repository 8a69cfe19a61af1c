"""What LoRA adds to a block's products in training: y = Wx + s·B(A·dropout(x)) (Hu et al., arXiv:2106.09685).

A layer's adapter is two rows of tensors, one for each half of the block. A row holds A (rank, in) and B (out, rank) of
each product that has an adapter, in the order of `ATTENTION` or `FEED_FORWARD`, float32; then for each of them the mask of
its dropout, (N, in), or None. Graphs take a row as arguments of their own behind the weights.
"""

from mindspore import nn, ops

# A half's products by the names of their weights, the one that leads back to the residual last. A key_value has one
# adapter, or two, of keys and of values.
ATTENTION = ("query", "key_value", "key", "value", "dense")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
PRODUCTS = ATTENTION + FEED_FORWARD


class LoraProducts(nn.Cell):
    """The products that a block's adapter adds. ``lora`` is a row of tensors, or the part of it that a piece takes.

    Args:
        targets (collection of str): the products that have an adapter, of `PRODUCTS`.
        scale (float): s.
        key_value_heads (int): number of key-value heads held here.
        kernels (Kernels): what computes.
    """

    def __init__(self, targets, scale, key_value_heads, kernels):
        super().__init__()
        self.kernels = kernels
        self.scale = scale
        self.key_value_heads = key_value_heads
        self.query, self.both, self.key, self.value = _places(ATTENTION[:-1], targets)
        self.gate, self.up = _places(FEED_FORWARD[:-1], targets)
        self.has_dense, self.has_down = ATTENTION[-1] in targets, FEED_FORWARD[-1] in targets

    def first(self, lora, has_last):
        """Of a half's row what its first piece takes, all but the last product's."""
        count = len(lora) // 3
        rest = count - has_last
        return lora[:2 * rest] + lora[2 * count:2 * count + rest]

    def last(self, lora, has_last):
        """Of a half's row what its last product takes."""
        if not has_last:
            return ()
        count = len(lora) // 3
        return lora[2 * count - 2:2 * count] + lora[3 * count - 1:]

    def linear(self, x, weight, place, lora, bias=None):
        """x·weightᵀ + bias with what the adapter at ``place`` adds; None: there is none."""
        if place is None:
            return self.kernels.linear(x, weight, bias)
        return self.kernels.adapted_linear(x, weight, bias, *self.factors(place, lora))

    def factors(self, place, lora):
        """A, B, s and the mask of the adapter at ``place``."""
        return lora[2 * place], lora[2 * place + 1], self.scale, lora[2 * (len(lora) // 3) + place]

    def key_value(self, x, weight, lora):
        """`linear` of keys and values, (N, m·2D), [k|v] head by head, which may have an adapter each."""
        if self.key is None and self.value is None:
            return self.linear(x, weight, self.both, lora)
        y = self.kernels.linear(x, weight)
        rows, width = y.shape
        half = (rows, self.key_value_heads, width // (2 * self.key_value_heads))
        nothing = ops.zeros(half, y.dtype)
        keys = nothing if self.key is None else self.product(x, self.key, lora).reshape(half)
        values = nothing if self.value is None else self.product(x, self.value, lora).reshape(half)
        return y + ops.concat((keys, values), -1).reshape(rows, width)

    def product(self, x, place, lora):
        """s·B(A·dropout(x)): (N, out)."""
        a, b, scale, mask = self.factors(place, lora)
        return self.kernels.low_rank(x, a, b, scale, mask)


def _places(products, targets):
    """Where each product's adapter stands among those there are; None for a product without one."""
    present = [name for name in products if name in targets]
    return [present.index(name) if name in present else None for name in products]


def trained(gradients, place, lora):
    """Of a piece's gradients, whose ones for ``lora`` begin at ``place``, those of A and B."""
    return gradients[place:place + 2 * (len(lora) // 3)]
