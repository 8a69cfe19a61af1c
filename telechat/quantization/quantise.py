"""A checkpoint's products quantised, a layer at a time: in memory are one layer and the activations of the calibration.

Layers are quantised in their order, and within a layer the products in that of the computation, each with the inputs that
it will have in the quantised model.
"""

import dataclasses
import math
import os

import numpy as np
from mindspore import Tensor

from telechat.checkpoint import layout
from telechat.checkpoint.products import PRODUCTS, is_product, product_weight
from telechat.checkpoint.reader import CheckpointReader
from telechat.checkpoint.writer import write_checkpoint
from telechat.data.encoding import IGNORED
from telechat.errors import InputError
from telechat.model import as_dtype
from telechat.nn.block import Block
from telechat.nn.kernel_choice import choose_kernels
from telechat.nn.layers import RMSNorm, scope
from telechat.nn.positions import sequence_tables
from telechat.nn.quantised import SMALLEST_GROUP, weight_parameters
from telechat.progress import Progress
from telechat.quantization.checkpoint import quantised_shapes, stored_tensors, with_settings
from telechat.quantization.padding import PaddedReader, padded_config
from telechat.quantization.rounding import DAMPING, gptq, relative_error, round_to_nearest

HELD_OUT = 10  # every so many sequences one is for the perplexity alone


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Of the held-out sequences, by the model as it was and as it is written; and over how many tokens."""

    before: float
    after: float
    tokens: int


def check_settings(bits, group):
    """InputError where no model can be quantised so."""
    if bits not in (4, 8):
        raise InputError(f"--bits must be 8 or 4, not {bits}")
    if group != -1 and (group < SMALLEST_GROUP or group % SMALLEST_GROUP):
        raise InputError(f"--group_size must be a multiple of {SMALLEST_GROUP}, or -1 for one group a row, not {group}")


def check_request(config, bits, group):
    """InputError where the products of a model cannot be quantised so, with settings that `check_settings` lets pass."""
    for name, shape in layout.parameter_shapes(config).items():
        if not (name.startswith("transformer.h.0.") and is_product(name)):
            continue
        outputs, inputs = shape
        size = inputs if group == -1 else group
        if inputs % size:
            common = math.gcd(*(length for length in (config.hidden_size, config.n_head * config.head_dim,
                                                      config.ffn_hidden_size)))
            fits = [length for length in range(SMALLEST_GROUP, common + 1, SMALLEST_GROUP) if common % length == 0]
            instead = f"one that does for all products is {max(fits, key=lambda length: (length <= group, length))}" if fits \
                else "none but -1 does"
            if not (config.hidden_size % size or config.n_head * config.head_dim % size):
                instead += f", or let --pad_ffn widen the feed-forward layers to {padded_config(config, group).ffn_hidden_size}"
            raise InputError(f"--group_size {group} does not divide the {inputs} inputs of {name.split('.', 3)[3][:-7]}; {instead}")
        if inputs % SMALLEST_GROUP or outputs % (32 // bits):
            raise InputError(f"{name} is {shape}, which {bits} bits in words of 32 do not fit; it cannot be quantised")


def quantise(load_checkpoint, output_dir, bits, group, read_calibration=None, say=print, pad_ffn=False):
    """Write a checkpoint of ours with the products of its blocks quantised.

    Args:
        load_checkpoint, output_dir (str): directories; what the second holds of an older conversion is replaced.
        bits (int): 8 or 4.
        group (int): inputs that share a scale; -1: all of a row.
        read_calibration (callable): gives a list of two or more sequences, (ids, labels) each, for GPTQ; called with the
            model's config when all else is checked. None: rounded to the nearest.
        say (callable): takes a line of the report.
        pad_ffn (bool): feed-forward layers are widened by zeros to the next multiple of the group (padding.py).

    Returns:
        (int, Perplexity or None): bytes of the weights written.

    Raises:
        InputError: the input is broken, or cannot be quantised so; the output cannot be written. Nothing has changed then.
    """
    check_settings(bits, group)
    if os.path.realpath(load_checkpoint) == os.path.realpath(output_dir):
        raise InputError(f"{load_checkpoint} is both input and output; give another output directory")
    reader = CheckpointReader(load_checkpoint)
    reader.check(layout.parameter_shapes(reader.config))
    width = reader.config.ffn_hidden_size
    if pad_ffn:
        reader = PaddedReader(reader, padded_config(reader.config, group))
    config, shapes = reader.config, layout.parameter_shapes(reader.config)
    check_request(config, bits, group)
    if config.ffn_hidden_size != width:
        say(f"feed-forward layers are widened by zeros from {width:,} to {config.ffn_hidden_size:,}, which changes no result")
    if read_calibration is None:
        say("rounding to the nearest: without --calibration no text tells which errors matter; a layer's errors are those of "
            "its weights, ‖W − Ŵ‖² / ‖W‖²")
    run = _Run(reader, bits, group, read_calibration and read_calibration(config), say)
    quantised = {product_weight(layer, product) for layer in range(config.n_layer) for product in PRODUCTS}
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True,
                "static_groups": False, "true_sequential": True, "damp_percent": DAMPING, "lm_head": False,
                "checkpoint_format": "gptq"}
    size = write_checkpoint(output_dir, with_settings(config, settings), run.tensors(shapes, quantised),
                            extra_from=load_checkpoint, shapes=quantised_shapes(shapes, quantised, bits, group))
    return size, run.perplexity


class _Run:
    """One quantisation under way."""

    def __init__(self, reader, bits, group, sequences, say):
        self.reader, self.bits, self.group, self.say = reader, bits, group, say
        self.config, self.perplexity = reader.config, None
        self.kernels = choose_kernels(self.config, as_dtype("float32"))
        self.kernels.require_device()
        self.calibration = self.before = self.after = None
        if sequences is not None:
            if len(sequences) < 2:
                raise InputError("the calibration holds one sequence, and it takes two: what is quantised with, and what the "
                                 "perplexity is of")
            self.held_out = sequences[::HELD_OUT]
            self.calibration = [ids for place, (ids, _) in enumerate(sequences) if place % HELD_OUT]

    def tensors(self, shapes, quantised):
        """(name, array) of all that is written."""
        first = "transformer.word_embeddings.weight"
        embedding = self.reader.read(first)
        if self.calibration is not None:
            self.calibration = [self._embed(embedding, ids) for ids in self.calibration]
            self.before = [self._embed(embedding, ids) for ids, _ in self.held_out]
            self.after = list(self.before)
        yield first, embedding
        del embedding
        with Progress("quantising", self.config.n_layer, "layers") as progress:
            for layer in range(self.config.n_layer):
                yield from self._layer(layer, shapes, quantised)
                progress.advance()
        rest = [name for name in shapes if name != first and not name.startswith("transformer.h.")]
        yield from ((name, self.reader.read(name)) for name in rest)
        if self.calibration is not None:
            self._measure()

    def _embed(self, embedding, ids):
        return embedding[np.asarray(ids)].astype(np.float32) * np.float32(self.config.input_mult)

    def _layer(self, layer, shapes, quantised):
        """(name, array) of a layer, after which activations are its outputs."""
        weights = {name: self.reader.read(name) for name in shapes if name.startswith(f"transformer.h.{layer}.")}
        products = self._rounded(weights) if self.calibration is None else self._calibrated(weights)
        errors = []
        for name, array in weights.items():
            if name not in quantised:
                yield name, array
                continue
            product, error = products[name]
            errors.append(f"{name.split('.')[-2]} {error:.2e}")
            yield from stored_tensors(name, product, self.bits)
        self.say(f"layer {layer}: " + ", ".join(errors))

    def _rounded(self, weights):
        products = {}
        for name in filter(is_product, weights):
            weight = weights[name].astype(np.float32)
            product = round_to_nearest(weight, self.bits, self._size(weight))
            products[name] = product, relative_error(weight, product)
        return products

    def _size(self, weight):
        return weight.shape[1] if self.group == -1 else self.group

    def _calibrated(self, weights):
        """Products by GPTQ, with the errors of their outputs; activations go through the layer on the way."""
        block = self._block(weights)
        self.before = [self._whole(block, x) for x in self.before]
        prefix = next(iter(weights)).split(".input_layernorm")[0]
        products, f = {}, block.functions

        def quantise(names, inputs):
            """Quantise the products of these names, which have these inputs, and let the block compute with them."""
            hessian = sum(np.matmul(x.T, x, dtype=np.float64) for x in inputs)
            for name in names:
                full = f"{prefix}.{name}.weight"
                weight = weights[full].astype(np.float32)
                product = gptq(weight, hessian, self.bits, self._size(weight))
                products[full] = product, relative_error(weight, product, hessian)
                room, _, cell = name.partition(".")
                getattr(getattr(block, room), cell).weight.set_data(Tensor(product.dequantised()))

        def norm(which, x):
            return f.kernels.rms_norm(Tensor(x), which.weight, f.epsilon).asnumpy()

        attention, mlp = block.self_attention, block.mlp
        normed = [norm(block.input_layernorm, x) for x in self.calibration]
        quantise(PRODUCTS[:2], normed)
        attended = [self._attend(f, x, attention) for x in normed]
        del normed
        quantise(PRODUCTS[2:3], attended)
        middle = [f.project_attention(Tensor(x), Tensor(inner), attention.dense.weight, attention.dense.bias).asnumpy()
                  for x, inner in zip(self.calibration, attended)]
        del attended
        normed = [norm(block.post_attention_layernorm, x) for x in middle]
        quantise(PRODUCTS[3:5], normed)
        inner = [f.kernels.swiglu(f.kernels.linear(Tensor(x), mlp.gate_proj.weight),
                                  f.kernels.linear(Tensor(x), mlp.up_proj.weight)).asnumpy() for x in normed]
        del normed
        quantise(PRODUCTS[5:], inner)
        self.calibration = [(Tensor(x) + f.contribution(Tensor(part), mlp.down_proj.weight, mlp.down_proj.bias)).asnumpy()
                            for x, part in zip(middle, inner)]
        self.after = [self._whole(block, x) for x in self.after]
        return products

    def _block(self, weights):
        prefix = next(iter(weights)).split(".input_layernorm")[0]
        make = scope(lambda name, shape: weight_parameters(weights[name], as_dtype("float32")), prefix)
        return Block(make, self.config, self.kernels).set_train(False)

    def _tables(self, length):
        cos, sin = map(self.kernels.rotary_tensor, sequence_tables(self.config, length))
        return cos, sin, self.kernels.attention_tensors(self.config, length)

    def _attend(self, functions, normed, attention):
        cos, sin, visible = self._tables(len(normed))
        query, key_value = (functions.kernels.linear(Tensor(normed), product.weight)
                            for product in (attention.query, attention.key_value))
        return functions.attend(query, key_value, cos, sin, *visible).asnumpy()

    def _whole(self, block, x):
        return block(Tensor(x), *self._tables(len(x))).asnumpy()

    def _measure(self):
        """The perplexity of the held-out sequences, from what the last layer gave."""
        config, name = self.config, "transformer.word_embeddings.weight" if self.config.tie_word_embeddings else "lm_head.weight"
        make = scope(lambda name, shape: weight_parameters(self.reader.read(name), as_dtype("float32")), "transformer.ln_f")
        norm = RMSNorm(make, config.hidden_size, config.layer_norm_epsilon, self.kernels)
        head = weight_parameters(self.reader.read(name), as_dtype("float32"))

        def loss(states):
            total = 0.0
            for x, (_, labels) in zip(states, self.held_out):
                targets = np.asarray(labels)[1:]
                rows = np.flatnonzero(targets != IGNORED)
                logits = self.kernels.linear(norm(Tensor(x[:-1][rows])), head).asnumpy().astype(np.float64) * config.logits_scale
                top = logits.max(1)
                total += (top + np.log(np.exp(logits - top[:, None]).sum(1)) - logits[np.arange(len(rows)), targets[rows]]).sum()
            return total

        tokens = sum(int((np.asarray(labels)[1:] != IGNORED).sum()) for _, labels in self.held_out)
        if tokens:
            self.perplexity = Perplexity(*(math.exp(min(loss(states) / tokens, 700)) for states in (self.before, self.after)),
                                         tokens)
