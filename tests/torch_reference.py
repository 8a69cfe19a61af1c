"""TeleChat in plain torch, written for the tests from the papers and the published layouts.

It reads official parameter names of all styles and knows nothing of the library, so that it
can say what the library must compute.
"""

import math

import torch

IGNORED = -100


class TorchTeleChat:
    """A model over a dict of official tensors.

    Args:
        config (dict): content of config.json; ``position_embedding`` "alibi" replaces rotary.
        tensors (dict): official names → torch tensors; those that require gradients get them.
    """

    def __init__(self, config, tensors):
        self.gpt2, self.llama = "n_embd" in config, "num_hidden_layers" in config
        self.config = config
        self.heads = config["num_attention_heads" if self.llama else "n_head"]
        self.layers = config["num_hidden_layers" if self.llama else "n_layer"]
        self.hidden = config["n_embd"] if self.gpt2 else config["hidden_size"]
        self.dim = config.get("head_dim", self.hidden // self.heads)
        self.epsilon = config["rms_norm_eps" if self.llama else "layer_norm_epsilon"]
        self.tensors = {_plain(name) if self.llama else name.removeprefix("transformer."): tensor
                        for name, tensor in tensors.items()}

    def __call__(self, ids, drops=lambda layer: (None, None, None)):
        """int64 (B, S) → logits (B, S, V); drops(layer): masks for attention and the two outputs."""
        t, batch, length = self.tensors, *ids.shape
        embedding = t["wte.weight" if self.gpt2 else "word_embeddings.weight"]
        x = embedding[ids] * self.config.get("input_mult", 1.0)
        for layer in range(self.layers):
            attention_drop, dense_drop, down_drop = drops(layer)
            normed = self._norm(x, t[f"h.{layer}.{'ln_1' if self.gpt2 else 'input_layernorm'}.weight"])
            q, k, v = (part.transpose(1, 2) for part in self._qkv(layer, normed))
            k, v = (part.repeat_interleave(self.heads // part.shape[1], 1) for part in (k, v))
            if self.config.get("position_embedding") == "alibi":
                scores = q @ k.transpose(2, 3) / math.sqrt(self.dim) + self._alibi(length)
            else:
                cos, sin = self._rotary(length)
                scores = self._rotate(q, cos, sin) @ self._rotate(k, cos, sin).transpose(2, 3) / math.sqrt(self.dim)
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            weights = torch.softmax(scores.masked_fill(future, -math.inf), -1)
            if attention_drop is not None:
                weights = weights * attention_drop
            attended = (weights @ v).transpose(1, 2).reshape(batch, length, -1)
            x = x + self._dropped(self._dense(layer, attended), dense_drop)
            normed = self._norm(x, t[f"h.{layer}.{'ln_2' if self.gpt2 else 'post_attention_layernorm'}.weight"])
            x = x + self._dropped(self._mlp(layer, normed), down_drop)
        x = self._norm(x, t["ln_f.weight"])
        logits = x @ t.get("lm_head.weight", embedding).T
        return logits * self.config.get("output_mult", 1.0) / self.config.get("mup_scale_factor", 1.0)

    def loss(self, ids, labels, drops=lambda layer: (None, None, None)):
        """Mean cross entropy over the counted tokens, shifted by one."""
        logits = self(ids, drops)[:, :-1]
        return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1),
                                                 ignore_index=IGNORED)

    def _qkv(self, layer, x):
        shape = (*x.shape[:2], -1, self.dim)
        if self.gpt2:
            return [part.reshape(shape) for part in (x @ self.tensors[f"h.{layer}.attn.c_attn.weight"]).chunk(3, -1)]
        prefix = f"h.{layer}.self_attention."
        query = (x @ self.tensors[prefix + "query.weight"].T).reshape(shape)
        if self.llama:
            return [query, *((x @ self.tensors[f"{prefix}{part}_proj.weight"].T).reshape(shape) for part in "kv")]
        key_value = (x @ self.tensors[prefix + "key_value.weight"].T).reshape(*x.shape[:2], -1, 2 * self.dim)
        return [query, *key_value.chunk(2, -1)]

    def _dense(self, layer, x):
        if self.gpt2:
            return x @ self.tensors[f"h.{layer}.attn.c_proj.weight"]
        prefix = f"h.{layer}.self_attention.dense."
        return x @ self.tensors[prefix + "weight"].T + self.tensors.get(prefix + "bias", 0.0)

    def _mlp(self, layer, x):
        silu, t, prefix = torch.nn.functional.silu, self.tensors, f"h.{layer}.mlp."
        if self.gpt2:
            gate, up = (x @ t[prefix + "c_fc.weight"]).chunk(2, -1)
            return (silu(gate) * up) @ t[prefix + "c_proj.weight"]
        hidden = silu(x @ t[prefix + "gate_proj.weight"].T) * (x @ t[prefix + "up_proj.weight"].T)
        return hidden @ t[prefix + "down_proj.weight"].T + t.get(prefix + "down_proj.bias", 0.0)

    def _norm(self, x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * weight

    def _rotary(self, length):
        """Within the training length, where no NTK factor of 12B or 52B applies; 7B's is 3 from 4,097 on."""
        if self.llama:
            return self._yarn(length)
        base = 10000.0
        if not self.gpt2 and self.config.get("tie_word_embeddings", True):
            context = max(length, self.config["training_seqlen"])
            base *= (2 ** math.ceil(math.log2(context / 4096) + 1) - 1) ** (self.dim / (self.dim - 2))
        angles = torch.outer(torch.arange(length).float(), 1.0 / base ** (torch.arange(0, self.dim, 2) / self.dim))
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.gpt2 else (cos.half().float(), sin.half().float())

    def _yarn(self, length):
        """TeleChat3's: its attention factor has 0.07; a ramp between the two ends, which are truncated."""
        scaling, theta, dim = self.config.get("rope_scaling"), self.config["rope_theta"], self.dim
        frequencies, factor = 1.0 / theta ** (torch.arange(0, dim, 2) / dim), 1.0
        if scaling:
            original = scaling["original_max_position_embeddings"]
            stretch = self.config["max_position_embeddings"] / original
            low, high = (dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))
                         for turns in (scaling["beta_fast"], scaling["beta_slow"]))
            low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
            ramp = ((torch.arange(dim // 2) - low) / (high - low)).clamp(0, 1)
            frequencies, factor = frequencies * (ramp / stretch + 1 - ramp), 1 + 0.07 * math.log(stretch)
        angles = torch.outer(torch.arange(length).float(), frequencies)
        angles = torch.cat((angles, angles), -1)
        return angles.cos() * factor, angles.sin() * factor

    def _rotate(self, x, cos, sin):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def _alibi(self, length):
        slopes = torch.tensor([2 ** (-8 * (head + 1) / self.heads) for head in range(self.heads)])
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        return -slopes[:, None, None] * distance

    @staticmethod
    def _dropped(x, mask):
        return x if mask is None else x * mask.reshape(x.shape)


def _plain(name):
    """A name of Llama's as 12B's without its prefix; keys and values stay apart."""
    for theirs, ours in (("model.", ""), ("layers.", "h."), ("embed_tokens", "word_embeddings"),
                         ("self_attn.q_proj", "self_attention.query"), ("self_attn.o_proj", "self_attention.dense"),
                         ("self_attn.", "self_attention.")):
        name = name.replace(theirs, ours, 1)
    return "ln_f.weight" if name == "norm.weight" else name


def torch_adamw(tensors, weight_decay):
    """torch's AdamW with the library's rule: weight decay on two and more dimensions only."""
    matrices = [tensor for tensor in tensors.values() if tensor.ndim > 1]
    vectors = [tensor for tensor in tensors.values() if tensor.ndim == 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                              {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8)
