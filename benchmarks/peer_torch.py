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
import os

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from benchmarks.peer_blocks import BestAttention, Block, OfficialAttention, RMSNorm, rotary_tables

IGNORED = -100


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
