"""TeleChat in plain torch, to measure the library against; it imports nothing of it.

Two grades compute the same numbers:

- *official* does what the official code does, operation for operation: activations turned to (S, B, H) for
  attention, rotary tables rebuilt in every layer at every call, scores by einsum, masked_fill, softmax, bmm, a
  cache grown by concatenation, logits of every position, and torch's ordinary AdamW;
- *best* is what one would write in torch for speed: scaled_dot_product_attention, tables made once, a cache
  allocated once, logits of the last position alone in generation, and the fused AdamW.

Weights have the published 12B's names; a config is anything with the fields of `telechat.TeleChatConfig`. There are
as many key-value heads as heads. Dropout is where the library has it, by torch's own generator.
"""

import json
import math
import os

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

IGNORED = -100


def ntk_alpha(length, context):
    """How far the rotary base is stretched for ``length`` tokens; 1 up to ``context``."""
    return max(2 ** math.ceil(math.log2(length / context) + 1) - 1, 1)


def rotary_tables(config, length):
    """cos and sin for a sequence of ``length`` tokens: float32 (rows, D), at least ``length`` rows.

    7B and 12B make ``training_seqlen`` rows at the least, and round to float16.
    """
    dim = config.hidden_size // config.n_head
    scale, base, rows = 1.0, config.rotary_base, length
    if config.rotary_ntk_scales_theta:
        base *= ntk_alpha(length, config.rotary_ntk_context)
    else:
        rows = max(length, config.training_seqlen)
        base *= ntk_alpha(rows, config.rotary_ntk_context) ** (dim / (dim - 2))
        scale = 0.1 * math.log(rows / config.training_seqlen) + 1.0
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
    angles = torch.einsum("i,j->ij", torch.arange(rows).float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if config.rotary_float16:
        cos, sin = cos.half(), sin.half()
    return (scale * cos).float(), (scale * sin).float()


def rotate(x, cos, sin):
    """Rotary positions in the rotate-half form."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.epsilon = config.layer_norm_epsilon

    def forward(self, x):
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.epsilon))


class Attention(nn.Module):
    """The weights of attention; ``key_value`` holds key and value rows head by head."""

    def __init__(self, config):
        super().__init__()
        self.config, self.heads = config, config.n_head
        hidden = config.hidden_size
        self.dim = hidden // self.heads
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.key_value = nn.Linear(hidden, 2 * hidden, bias=False)
        self.dense = nn.Linear(hidden, hidden, bias=config.use_bias)


class OfficialAttention(Attention):
    def forward(self, x, mask, past):
        """x (B, S, H); mask bool (B, 1, S, keys), True where hidden; past None or keys and values (keys, B, n, D).

        Returns the output and the keys and values so far.
        """
        x = x.transpose(0, 1)
        length, batch = x.shape[:2]
        query = self.query(x).view(length, batch, self.heads, self.dim)
        key, value = self.key_value(x).view(length, batch, self.heads, 2 * self.dim).split(self.dim, dim=-1)
        offset = 0 if past is None else past[0].shape[0]
        cos, sin = rotary_tables(self.config, offset + length)
        cos, sin = (table[offset:offset + length, None, None] for table in (cos, sin))
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past is not None:
            key, value = torch.cat((past[0], key)), torch.cat((past[1], value))
        past = key, value
        query, key, value = (part.reshape(part.shape[0], batch * self.heads, self.dim).transpose(0, 1)
                             for part in (query, key, value))
        scores = self.dim ** -0.5 * torch.einsum("bik,bkj->bij", query, key.transpose(1, 2))
        scores = scores.view(batch, self.heads, length, -1).masked_fill(mask, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1).view(batch * self.heads, length, -1)
        weights = F.dropout(weights, self.config.attention_dropout, self.training)
        attended = torch.bmm(weights, value).view(batch, self.heads, length, self.dim)
        return self.dense(attended.transpose(1, 2).reshape(batch, length, -1)), past


class BestAttention(Attention):
    def forward(self, x, cos, sin, keys=None, values=None, start=0):
        """x (B, S, H); cos, sin (S, D); keys, values: the cache (B, n, T, D), filled up to ``start``."""
        batch, length = x.shape[:2]
        query = self.query(x).view(batch, length, self.heads, self.dim).transpose(1, 2)
        cos, sin = cos.to(query.dtype), sin.to(query.dtype)
        query = rotate(query, cos, sin)
        key, value = self.key_value(x).view(batch, length, self.heads, 2 * self.dim).transpose(1, 2).chunk(2, dim=-1)
        key = rotate(key, cos, sin)
        if keys is not None:
            end = start + length
            keys[:, :, start:end], values[:, :, start:end] = key, value
            if start:
                key, value = keys[:, :, :end], values[:, :, :end]
        rate = self.config.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=length > 1, dropout_p=rate)
        return self.dense(attended.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, attention):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attention = attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)


class Peer(nn.Module):
    """What the grades share: the weights under their published names, embedding and head."""

    def __init__(self, config, attention):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "word_embeddings": nn.Embedding(config.vocab_size, config.hidden_size),
            "h": nn.ModuleList(Block(config, attention) for _ in range(config.n_layer)),
            "ln_f": RMSNorm(config)})
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, ids):
        x = self.transformer["word_embeddings"](ids)
        x = x if self.config.input_mult == 1 else x * self.config.input_mult
        return F.dropout(x, self.config.embedding_dropout, self.training)

    def add(self, x, y):
        """The residual."""
        return x + F.dropout(y, self.config.hidden_dropout, self.training)

    def head(self, x):
        weight = (self.transformer["word_embeddings"] if self.lm_head is None else self.lm_head).weight
        logits = F.linear(self.transformer["ln_f"](x), weight)
        scale = self.config.output_mult / self.config.mup_scale_factor
        return logits if scale == 1 else logits * scale


class Official(Peer):
    def __init__(self, config):
        super().__init__(config, OfficialAttention)

    def forward(self, ids, past=None):
        """int64 (B, S) → logits (B, S, V) of every position; ``past`` (list, a layer each) is replaced in place."""
        x, length = self.embed(ids), ids.shape[1]
        offset = 0 if past is None or past[0] is None else past[0][0].shape[0]
        steps = torch.arange(length)
        mask = torch.zeros(length, offset + length, dtype=torch.bool)
        mask[:, offset:] = steps[:, None] < steps[None, :]
        mask = mask[None, None].expand(len(ids), 1, length, offset + length)
        for layer, block in enumerate(self.transformer["h"]):
            attended, kept = block.self_attention(block.input_layernorm(x), mask, past and past[layer])
            if past is not None:
                past[layer] = kept
            x = self.add(x, attended)
            x = self.add(x, block.mlp(block.post_attention_layernorm(x)))
        return self.head(x)

    @torch.no_grad()
    def generate(self, prompts, new_tokens):
        """Greedy tokens that follow ``prompts`` int64 (B, S): int64 (B, new_tokens)."""
        past, tokens, ids = [None] * self.config.n_layer, [], prompts
        for _ in range(new_tokens):
            ids = self(ids, past)[:, -1].argmax(-1, keepdim=True)
            tokens.append(ids)
        return torch.cat(tokens, dim=1)

    def optimizer(self, **settings):
        return torch.optim.AdamW(_decay_groups(self), **settings)


class Best(Peer):
    """Up to ``training_seqlen`` tokens, where the tables do not depend on the length."""

    def __init__(self, config):
        super().__init__(config, BestAttention)
        self._tables = None

    def forward(self, ids, caches=None, start=0, last_only=False):
        """int64 (B, S) → logits (B, S, V), or (B, 1, V) of the last position.

        ``caches``: keys and values (B, n, T, D) of each layer, filled up to ``start``.
        """
        if self._tables is None:
            limit = self.config.rotary_ntk_context if self.config.rotary_ntk_scales_theta else \
                self.config.training_seqlen
            self._tables = rotary_tables(self.config, limit)
        x, length = self.embed(ids), ids.shape[1]
        cos, sin = (table[start:start + length] for table in self._tables)
        for layer, block in enumerate(self.transformer["h"]):
            cache = (None, None) if caches is None else caches[layer]
            x = self.add(x, block.self_attention(block.input_layernorm(x), cos, sin, *cache, start))
            x = self.add(x, block.mlp(block.post_attention_layernorm(x)))
        return self.head(x[:, -1:] if last_only else x)

    @torch.inference_mode()
    def generate(self, prompts, new_tokens):
        """Greedy tokens that follow ``prompts`` int64 (B, S): int64 (B, new_tokens)."""
        config, (batch, start) = self.config, prompts.shape
        shape = (batch, config.n_head, start + new_tokens, config.hidden_size // config.n_head)
        dtype = self.transformer["ln_f"].weight.dtype
        caches = [(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)) for _ in range(config.n_layer)]
        tokens, ids, position = torch.empty(batch, new_tokens, dtype=torch.long), prompts, 0
        for index in range(new_tokens):
            logits = self(ids, caches, position, last_only=True)
            position += ids.shape[1]
            ids = torch.argmax(logits[:, -1], -1, keepdim=True)
            tokens[:, index:index + 1] = ids
        return tokens

    def optimizer(self, **settings):
        return torch.optim.AdamW(_decay_groups(self), fused=True, **settings)


GRADES = {"official": Official, "best": Best}


def _decay_groups(model):
    """Weight decay goes to parameters of two and more dimensions, and not to the rest."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def train_step(model, optimizer, ids, targets, rate, max_grad_norm=1.0, autocast=False):
    """One step; targets int64 (B, S): the token that each position is to predict, or -100.

    autocast: products in bfloat16, as torch.autocast does it. Returns the loss and the gradient's norm before clipping,
    as floats.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(ids)
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORED)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return loss.item(), norm.item()


def load(grade, config, directory, share_file=False, dtype="float32"):
    """The model of a checkpoint directory of ours, its weights in ``dtype``.

    ``share_file``: the weights stay where the files are mapped into memory, read only, instead of being copied into
    memory of the model's own. The official way is the copy.
    """
    with torch.device("meta"):
        model = GRADES[grade](config).to(getattr(torch, dtype))
    if not share_file:
        model.to_empty(device="cpu")
    index = os.path.join(directory, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if os.path.isfile(index):
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    found = set()
    for name in names:
        tensors = load_file(os.path.join(directory, name))
        found |= set(tensors)
        model.load_state_dict(tensors, strict=False, assign=share_file)
        del tensors  # unmaps the file, unless the model shares it
    if found != set(model.state_dict()):
        raise ValueError(f"{directory} does not hold the tensors of this model")
    return model
