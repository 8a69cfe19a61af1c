"""Forward and backward of a block in training: its two halves one behind the other, for every layer of a model."""

from telechat.nn.block import OF_ATTENTION
from telechat.nn.block_graphs import Attention, FeedForward
from telechat.nn.blockwise_attention import BlockMasks
from telechat.nn.blockwise_block import AttentionByBlocks

NO_LORA = ((), ()), ((), ())


class BlockTraining:
    """Forward and backward pass of a block.

    Arguments of both: tables: cos, sin, and the three of `Kernels.attention_tensors`; drops: dropout masks of
    attention and of the two outputs added to the residual, None for none; weights as `Block.weights` gives
    them, their ``data``; lora: a layer's adapter, for each half its A and B in turn, and the masks of their dropout.

    Args:
        functions (BlockFunctions): what is computed.
    """

    def __init__(self, functions):
        self.attention, self.attention_by_blocks = Attention(functions), AttentionByBlocks(functions)
        self.feed_forward = FeedForward(functions)

    def forward(self, x, tables, drops, weights, lora=NO_LORA):
        """x (rows, H) → the block's output (rows, H), and what `backward` starts from besides x."""
        (pairs, masks), (inner_pairs, inner_masks) = lora
        middle, *kept = self._attention_for(tables)(x, *tables, *drops[:2], *weights[:OF_ATTENTION], *pairs, *masks)
        y, inner = self.feed_forward(middle, drops[2], *weights[OF_ATTENTION:], *inner_pairs, masks=inner_masks)
        return y, (middle, kept, inner)

    def backward(self, dy, x, kept, tables, drops, weights, lora=NO_LORA):
        """The gradients of x and of the weights there are, or of the adapter's A and B, from the output's.

        kept: as `forward` gave it; None: computed again, up to the products whose results only the output
        needs (recomputation; Chen et al., arXiv:1604.06174).
        """
        attention = self._attention_for(tables)
        (pairs, masks), (inner_pairs, inner_masks) = lora
        first = *tables, *drops[:2], *weights[:OF_ATTENTION], *pairs, *masks
        if kept is None:
            middle, *kept = attention(x, *first)
            inner = None
        else:
            middle, kept, inner = kept
        dmiddle, *outer = self.feed_forward.backward(dy, middle, inner, drops[2], *weights[OF_ATTENTION:], *inner_pairs,
                                                     masks=inner_masks)
        del middle, inner  # their memory is for attention's backward pass
        dx, *gradients = attention.backward(dmiddle, x, *kept, *first)
        return dx, *gradients, *outer

    def _attention_for(self, tables):
        return self.attention_by_blocks if isinstance(tables[2], BlockMasks) else self.attention
