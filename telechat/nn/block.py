"""One transformer block: attention and a gated feed-forward layer, each after an RMSNorm.

`BlockFunctions` is the computation, with the weights as arguments, so that one compiled graph
serves every layer of a model; `Block` holds one layer's weights under their published names. The
computation is cut where the products are: each piece begins with what a product needs and ends
before the next, which is also what training keeps for the backward pass.
"""

from mindspore import nn, ops

from telechat.nn import kernels
from telechat.nn.layers import Linear, RMSNorm, scope


class BlockFunctions(nn.Cell):
    """The pieces of a block. Activations are (B·S, …), heads (B, heads, S, D).

    Args:
        head_dim (int): D.
        key_value_heads (int): number of key-value heads held here.
        epsilon (float): of the norms.
        rotary (bool): whether queries and keys are rotated.
    """

    def __init__(self, head_dim, key_value_heads, epsilon, rotary):
        super().__init__()
        self.head_dim = head_dim
        self.key_value_heads = key_value_heads
        self.epsilon = epsilon
        self.rotary = rotary
        self.scale = head_dim ** -0.5
        # What surrounds each pair of products: nothing here. Where the weights are cut over several
        # devices, telechat/parallel puts its collectives in their place.
        self.enter = self.leave = Unchanged()

    def project_qkv(self, x, norm, query, key_value):
        """x (B·S, H) → queries (B·S, n·D), keys and values (B·S, m·2D), [k|v] head by head."""
        x = self.enter(kernels.rms_norm(x, norm, self.epsilon))
        return kernels.linear(x, query), kernels.linear(x, key_value)

    def heads(self, query, key_value, cos, sin):
        """Split into heads and rotate: query (B, n, S, D), key and value (B, m, S, D).

        cos and sin are (1 or B, 1, S, D); their shape gives S.
        """
        length = cos.shape[2]
        query = query.reshape(-1, length, query.shape[-1] // self.head_dim, self.head_dim)
        query = query.transpose(0, 2, 1, 3)
        key_value = key_value.reshape(-1, length, self.key_value_heads, 2 * self.head_dim)
        key, value = ops.Split(-1, 2)(key_value.transpose(0, 2, 1, 3))
        if self.rotary:
            query, key = kernels.rotate(query, cos, sin), kernels.rotate(key, cos, sin)
        return query, key, value

    def merge(self, heads):
        """(B, n, S, D) → (B·S, n·D)."""
        batch, count, length, dim = heads.shape
        return heads.transpose(0, 2, 1, 3).reshape(batch * length, count * dim)

    def attend(self, query, key_value, cos, sin, mask, dropout=None):
        """Causal self-attention of what `project_qkv` gives: (B·S, n·D)."""
        query, key, value = self.heads(query, key_value, cos, sin)
        return self.merge(kernels.attention(query, key, value, mask, self.scale, dropout))

    def project_attention(self, x, attended, dense, bias=None, dropout=None):
        """Output product of attention, added to the residual x (B·S, H)."""
        return self._residual(x, kernels.linear(attended, dense), bias, dropout)

    def project_gate_up(self, x, norm, gate, up):
        """x (B·S, H) → gate and up, (B·S, F) each."""
        x = self.enter(kernels.rms_norm(x, norm, self.epsilon))
        return kernels.linear(x, gate), kernels.linear(x, up)

    def project_down(self, x, gate, up, down, bias=None, dropout=None):
        """Down product of the feed-forward layer, added to the residual x (B·S, H)."""
        return self._residual(x, kernels.linear(kernels.swiglu(gate, up), down), bias, dropout)

    def construct(self, x, cos, sin, mask, dropouts, weights):
        """The whole block: x (B·S, H) → (B·S, H).

        dropouts: attention (B, n, S, S) and the two outputs (B·S, H), None for none; weights as
        `Block.weights` gives them.
        """
        return self.forward(x, cos, sin, mask, dropouts, weights)[0]

    def forward(self, x, cos, sin, mask, dropouts, weights):
        """As `construct`, and what the backward pass starts from: the inputs of the products."""
        norm1, query, key_value, dense, dense_bias, norm2, gate, up, down, down_bias = weights
        drop_attention, drop_dense, drop_down = dropouts
        q, kv = self.project_qkv(x, norm1, query, key_value)
        attended = self.attend(q, kv, cos, sin, mask, drop_attention)
        middle = self.project_attention(x, attended, dense, dense_bias, drop_dense)
        g, u = self.project_gate_up(middle, norm2, gate, up)
        y = self.project_down(middle, g, u, down, down_bias, drop_down)
        return y, q, kv, attended, middle, g, u

    def finish(self, x, attended, weights):
        """From attention's result to the block's output, without dropout."""
        _, _, _, dense, dense_bias, norm2, gate, up, down, down_bias = weights
        x = self.project_attention(x, attended, dense, dense_bias)
        g, u = self.project_gate_up(x, norm2, gate, up)
        return self.project_down(x, g, u, down, down_bias)

    def _residual(self, x, product, bias, dropout):
        y = kernels.add_bias(self.leave(product), bias)
        return x + y if dropout is None else x + y * dropout.astype(y.dtype)


class Unchanged(nn.Cell):
    """The identity."""

    def construct(self, x):
        return x


class SelfAttention(nn.Cell):
    """Weights of attention; ``key_value`` is laid out [k|v] for each key-value head."""

    def __init__(self, make, config):
        super().__init__()
        hidden, key_value = config.hidden_size, 2 * config.num_key_value_heads * config.head_dim
        self.query = Linear(scope(make, "query"), hidden, config.n_head * config.head_dim)
        self.key_value = Linear(scope(make, "key_value"), hidden, key_value)
        self.dense = Linear(scope(make, "dense"), config.n_head * config.head_dim, hidden, config.use_bias)


class MLP(nn.Cell):
    """Weights of the gated feed-forward layer."""

    def __init__(self, make, config):
        super().__init__()
        hidden, inner = config.hidden_size, config.ffn_hidden_size
        self.gate_proj = Linear(scope(make, "gate_proj"), hidden, inner)
        self.up_proj = Linear(scope(make, "up_proj"), hidden, inner)
        self.down_proj = Linear(scope(make, "down_proj"), inner, hidden, config.use_bias)


class Block(nn.Cell):
    """One layer of a model: its weights, and `BlockFunctions` applied to them."""

    def __init__(self, make, config):
        super().__init__()
        self.input_layernorm = RMSNorm(scope(make, "input_layernorm"),
                                       config.hidden_size, config.layer_norm_epsilon)
        self.self_attention = SelfAttention(scope(make, "self_attention"), config)
        self.post_attention_layernorm = RMSNorm(scope(make, "post_attention_layernorm"),
                                                config.hidden_size, config.layer_norm_epsilon)
        self.mlp = MLP(scope(make, "mlp"), config)
        self.functions = BlockFunctions(config.head_dim, config.num_key_value_heads,
                                        config.layer_norm_epsilon, config.position_embedding == "rotary")

    def weights(self):
        """The layer's parameters in the order of `BlockFunctions.forward`; None for an absent bias."""
        attention, mlp = self.self_attention, self.mlp
        return (self.input_layernorm.weight, attention.query.weight, attention.key_value.weight,
                attention.dense.weight, attention.dense.bias, self.post_attention_layernorm.weight,
                mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, mlp.down_proj.bias)

    def construct(self, x, cos, sin, mask):
        """x (B·S, H) → (B·S, H), without dropout."""
        return self.functions(x, cos, sin, mask, (None, None, None), self.weights())
