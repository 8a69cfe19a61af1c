"""A layer of TeleChat in plain torch, in the two grades of peer_torch.py: its rotary tables, attention, feed-forward layer."""

import math

import torch
from torch import nn
from torch.nn import functional as F


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
