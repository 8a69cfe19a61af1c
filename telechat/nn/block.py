"""One transformer block: attention and a gated feed-forward layer, each after an RMSNorm.

`BlockFunctions` is the computation, with the weights as arguments, so that one compiled graph
serves every layer of a model; `Block` holds one layer's weights under their published names. The
computation is cut where the products are: each piece begins with what a product needs and ends
before the next, which is also what training keeps for the backward pass.
"""

from mindspore import nn

from telechat.nn.layers import Linear, RMSNorm, scope
from telechat.nn.lora import LoraProducts
from telechat.nn.quantised import as_arguments

ADAPTED = 4  # tensors in the place of a weight with LoRA adapters, see `BlockFunctions.linear`
PRODUCTS = (1, 2, 3, 6, 7, 8)  # places of the products' weights in `Block.weights`
OF_ATTENTION = 5  # weights of `Block.weights`, the first ones; the others are the feed-forward layer's


class BlockFunctions(nn.Cell):
    """The pieces of a block. Activations are (B·S, …), heads as `Kernels.split_heads` gives them.

    Args:
        head_dim (int): D.
        key_value_heads (int): number of key-value heads held here.
        epsilon (float): of the norms.
        rotary (bool): whether queries and keys are rotated.
        kernels (Kernels): what computes.
        lora (LoraProducts): what an adapter adds in training, where the weights are frozen; None for none. Its tensors
            are the last arguments of each piece, ``lora``.
    """

    def __init__(self, head_dim, key_value_heads, epsilon, rotary, kernels, lora=None):
        super().__init__()
        self.kernels = kernels
        self.head_dim = head_dim
        self.key_value_heads = key_value_heads
        self.epsilon = epsilon
        self.rotary = rotary
        self.lora = lora
        self.scale = head_dim ** -0.5
        # The hooks of tensor parallelism before and behind each pair of products: nothing here. Where the
        # weights are cut over several devices, telechat/parallel puts its collectives in their place.
        self.copy_to = self.reduce_from = Unchanged()
        self.is_tensor_parallel = False

    def set_tensor_parallel(self, copy_to, reduce_from):
        """Put Cells before and behind each pair of products; the bias is added behind ``reduce_from``."""
        self.copy_to, self.reduce_from, self.is_tensor_parallel = copy_to, reduce_from, True

    def adapted(self, targets, scale):
        """The same computation with an adapter: arguments as of `LoraProducts`."""
        lora = LoraProducts(targets, scale, self.key_value_heads, self.kernels)
        result = BlockFunctions(self.head_dim, self.key_value_heads, self.epsilon, self.rotary, self.kernels, lora)
        if self.is_tensor_parallel:
            result.set_tensor_parallel(self.copy_to, self.reduce_from)
        return result

    def cut_attention(self, lora):
        """An adapter's tensors of attention → those of `project_qkv`, those of `project_attention`."""
        if len(lora) == 0:
            return (), ()
        return self.lora.first(lora, self.lora.has_dense), self.lora.last(lora, self.lora.has_dense)

    def cut_feed_forward(self, lora):
        """The same of `project_gate_up` and `project_down`."""
        if len(lora) == 0:
            return (), ()
        return self.lora.first(lora, self.lora.has_down), self.lora.last(lora, self.lora.has_down)

    def project_qkv(self, x, norm, query, key_value, *lora):
        """x (B·S, H) → queries (B·S, n·D), keys and values (B·S, m·2D), [k|v] head by head."""
        x = self.copy_to(self.kernels.rms_norm(x, norm, self.epsilon))
        if len(lora) == 0:
            return self.linear_pair(x, query, key_value)
        return self.lora.linear(x, query, self.lora.query, lora), self.lora.key_value(x, key_value, lora)

    def heads(self, query, key_value, cos, sin):
        """Split into heads and rotate: n heads of query, m of key and value.

        cos and sin are (1 or B, 1, S, D); their shape gives S.
        """
        length = cos.shape[2]
        query = self.kernels.split_heads(query, length, self.head_dim)
        key, value = self.kernels.split_key_value(key_value, length, self.head_dim)
        if self.rotary:
            query, key = self.kernels.rotate(query, cos, sin), self.kernels.rotate(key, cos, sin)
        return query, key, value

    def heads_backward(self, dquery, dkey, dvalue, cos, sin):
        """From the gradients of what `heads` gives to those of its first two arguments."""
        if self.rotary:
            # The transpose of a rotation is the one by the opposite angle.
            dquery, dkey = self.kernels.rotate(dquery, cos, sin * -1.0), self.kernels.rotate(dkey, cos, sin * -1.0)
        return self.kernels.merge_heads(dquery), self.kernels.merge_key_value(dkey, dvalue)

    def attend(self, query, key_value, cos, sin, mask, position_bias, segment_ids):
        """Causal self-attention of what `project_qkv` gives: (B·S, n·D).

        mask, position_bias, segment_ids: of `Kernels.attention_tensors`.
        """
        query, key, value = self.heads(query, key_value, cos, sin)
        attended = self.kernels.attention(query, key, value, mask, position_bias, segment_ids, self.scale)
        return self.kernels.merge_heads(attended)

    def project_attention(self, x, attended, dense, bias=None, dropout=None, *lora):
        """Output product of attention, added to the residual x (B·S, H)."""
        return self._residual(x, attended, dense, bias, dropout, lora)

    def project_gate_up(self, x, norm, gate, up, *lora):
        """x (B·S, H) → gate and up, (B·S, F) each."""
        x = self.copy_to(self.kernels.rms_norm(x, norm, self.epsilon))
        if len(lora) == 0:
            return self.linear_pair(x, gate, up)
        return self.lora.linear(x, gate, self.lora.gate, lora), self.lora.linear(x, up, self.lora.up, lora)

    def project_down(self, x, gate, up, down, bias=None, dropout=None, *lora):
        """Down product of the feed-forward layer, added to the residual x (B·S, H)."""
        return self._residual(x, self.kernels.swiglu(gate, up), down, bias, dropout, lora)

    def construct(self, x, cos, sin, visible, weights):
        """The whole block without dropout: x (B·S, H) → (B·S, H).

        visible: the three of `Kernels.attention_tensors`; weights as `Block.weights` gives them.
        """
        norm1, query, key_value, dense, dense_bias, norm2, gate, up, down, down_bias = weights
        q, kv = self.project_qkv(x, norm1, query, key_value)
        attended = self.attend(q, kv, cos, sin, *visible)
        middle = self.project_attention(x, attended, dense, dense_bias)
        g, u = self.project_gate_up(middle, norm2, gate, up)
        return self.project_down(middle, g, u, down, down_bias)

    def decode(self, x, delta, rotation, places, caches, weights):
        """One new token a sequence: x (B, H) and what is to be added to it → the same pair behind the block.

        delta (B, H), None in the first block; rotation, places and caches: as `Kernels.cached_attention`
        takes them. Without dropout and gradient.
        """
        norm1, query, key_value, dense, dense_bias, norm2, gate, up, down, down_bias = weights
        kernels = self.kernels
        if delta is None:
            normed = kernels.rms_norm(x, norm1, self.epsilon)
        else:
            normed, x = kernels.add_rms_norm(x, delta, norm1, self.epsilon)
        normed = self.copy_to(normed)
        attended = kernels.cached_attention(self.linear(normed, query), self.linear(normed, key_value), rotation,
                                            caches, places, self.scale)
        delta = self.contribution(attended, dense, dense_bias)
        normed, x = kernels.add_rms_norm(x, delta, norm2, self.epsilon)
        normed = self.copy_to(normed)
        inner = kernels.swiglu(self.linear(normed, gate), self.linear(normed, up))
        return x, self.contribution(inner, down, down_bias)

    def contribution(self, x, weight, bias, lora=()):
        """The product x·weightᵀ + bias that is added to the residual."""
        own = None if self.is_tensor_parallel else bias  # else it is added once, behind the sum over devices
        y = self.linear(x, weight, own) if len(lora) == 0 else self.lora.linear(x, weight, 0, lora, own)
        return self.kernels.add_bias(self.reduce_from(y), bias) if self.is_tensor_parallel else y

    def linear(self, x, weight, bias=None):
        """x·weightᵀ + bias. In the place of a weight there may be four: with A and B of the adapters that answer, and which
        of their columns each row takes, (rows, R) or (1, R) for all alike (telechat/adapters/unmerged.py)."""
        if not has_adapter(weight):
            return self.kernels.linear(x, weight, bias)
        weight, a, b, columns = weight
        added = self.kernels.linear(self.kernels.linear(x, a) * columns, b)
        return self.kernels.linear(x, weight, bias) + added

    def linear_pair(self, x, first, second):
        """`linear` of one x with two weights."""
        if has_adapter(first) or has_adapter(second):
            return self.linear(x, first), self.linear(x, second)
        return self.kernels.linear_pair(x, first, second)

    def _residual(self, x, inner, weight, bias, dropout, lora=()):
        y = self.contribution(inner, weight, bias, lora)
        return x + y if dropout is None else x + y * dropout.astype(y.dtype)


def has_adapter(weight):
    """Whether a weight is four, as `BlockFunctions.linear` takes them; a quantised one alone is two or three."""
    return isinstance(weight, tuple) and len(weight) == ADAPTED


def with_adapters(weights, columns, factors):
    """Weights of products as `BlockFunctions.linear` takes them, some of them with LoRA adapters; to be called in a graph.

    weights: some of `Block.weights`; columns: which columns each row takes, (rows, R); factors: A and B of each weight, one
    behind the other, two None for a weight that no adapter changes. Nothing changes where factors is empty.
    """
    if len(factors) == 0:
        return weights
    result = ()
    for place in range(len(weights)):
        if factors[2 * place] is None:
            result += (weights[place],)
        else:
            result += ((weights[place], factors[2 * place], factors[2 * place + 1], columns),)
    return result


def without_adapters(weights):
    """`Block.weights` apart: without adapters beside them, and A and B of each product's adapter, two None for none."""
    factors = [part for place in PRODUCTS for part in (weights[place][1:3] if has_adapter(weights[place]) else (None, None))]
    return [weight[0] if has_adapter(weight) else weight for weight in weights], factors


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

    def __init__(self, make, config, kernels):
        super().__init__()
        self.input_layernorm = RMSNorm(scope(make, "input_layernorm"),
                                       config.hidden_size, config.layer_norm_epsilon, kernels)
        self.self_attention = SelfAttention(scope(make, "self_attention"), config)
        self.post_attention_layernorm = RMSNorm(scope(make, "post_attention_layernorm"),
                                                config.hidden_size, config.layer_norm_epsilon, kernels)
        self.mlp = MLP(scope(make, "mlp"), config)
        self.functions = BlockFunctions(config.head_dim, config.num_key_value_heads,
                                        config.layer_norm_epsilon, config.position_embedding == "rotary",
                                        kernels)

    def products(self):
        """The cells that hold the products' weights, in the order of the computation."""
        attention, mlp = self.self_attention, self.mlp
        return attention.query, attention.key_value, attention.dense, mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def weights(self):
        """The layer's parameters in the order of `BlockFunctions.construct`; None for an absent bias.

        In the place of a quantised weight there is the tuple of nn/quantised.py, and of one with an adapter that of
        `BlockFunctions.linear`.
        """
        attention, mlp = self.self_attention, self.mlp
        return (self.input_layernorm.weight, attention.query.factor, attention.key_value.factor,
                attention.dense.factor, attention.dense.bias, self.post_attention_layernorm.weight,
                mlp.gate_proj.factor, mlp.up_proj.factor, mlp.down_proj.factor, mlp.down_proj.bias)

    def tensors(self):
        """`weights` as graphs take them that serve all layers: a Parameter would compile anew for each."""
        return list(map(as_arguments, self.weights()))

    def construct(self, x, cos, sin, visible):
        """x (B·S, H) → (B·S, H), without dropout."""
        return self.functions(x, cos, sin, visible, self.weights())
