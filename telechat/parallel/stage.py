"""Stage: the layers and the parts of their weights that one process holds."""

import numpy as np

from telechat.checkpoint.layout import parameter_shapes
from telechat.model import as_dtype, initial_tensor
from telechat.nn.block import Block
from telechat.nn.kernel_choice import choose_kernels
from telechat.nn.layers import Embedding, Linear, RMSNorm, scope, set_kernels
from telechat.nn.quantised import weight_parameters
from telechat.parallel.collectives import CopyTo, GatherRows, ReduceFrom, ScatterRows
from telechat.parallel.plan import block_shape, is_vocabulary, local_slices, stage_layers, vocabulary_rows
from telechat.progress import Progress


class Stage:
    """One process's share of a model: a whole one, or some layers of it, cut over tensor-parallel ranks.

    Attributes:
        config (TeleChatConfig): of the whole model.
        layers (range): the layers held here.
        blocks (list of Block): one for each of them.
        word_embeddings, ln_f, lm_head: cells, None where another stage holds them. With a tied head
            the last stage holds the embedding too.
        parameters (dict): canonical name → Parameter, in the model's order.
        slices (dict): canonical name → the part of the whole parameter held here.
        first_token (int): the token of the embedding's first row here.
    """

    def __init__(self, config, layers, blocks, word_embeddings, ln_f, lm_head, parameters, slices, first_token, dtype,
                 kernels):
        self.config = config
        self.layers = layers
        self.blocks = blocks
        self.word_embeddings = word_embeddings
        self.ln_f = ln_f
        self.lm_head = lm_head
        self.parameters = parameters
        self.slices = slices
        self.first_token = first_token
        self.dtype = dtype
        self.kernels = kernels
        self.first = layers[0] == 0
        self.last = layers[-1] == config.n_layer - 1

    @property
    def compute_dtype(self):
        """Dtype of the activations."""
        return self.kernels.dtype

    def set_kernels(self, kernels):
        """Let other kernels compute."""
        self.kernels = kernels
        for cell in (*self.blocks, self.word_embeddings, self.ln_f, self.lm_head):
            if cell is not None:
                set_kernels(cell, kernels)

    @property
    def functions(self):
        """The blocks' computation; the same for every layer."""
        return self.blocks[0].functions

    @property
    def head_weight(self):
        """The head's own weight, or the embedding where they are tied."""
        return self.word_embeddings.weight if self.lm_head is None else self.lm_head.weight

    def groups(self):
        """Names of the parameters as they are updated together: embedding, each block, norm and head."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        cells = [[self.word_embeddings], *([block] for block in self.blocks), [self.ln_f, self.lm_head]]
        result = []
        for group in cells:
            parameters = []
            for cell in group:
                if isinstance(cell, Block):
                    parameters += [weight for weight in cell.weights() if weight is not None]
                elif cell is not None:
                    parameters.append(cell.weight)
            result.append([names[id(parameter)] for parameter in parameters])
        return result

    @classmethod
    def of_model(cls, model):
        """A whole `TeleChat` as the only stage."""
        transformer = model.transformer
        parameters = {parameter.name: parameter for parameter in model.get_parameters()}
        slices = {name: tuple(slice(0, length) for length in p.shape) for name, p in parameters.items()}
        return cls(model.config, range(model.config.n_layer), list(transformer.h), transformer.word_embeddings,
                   transformer.ln_f, model.lm_head, parameters, slices, 0, model.dtype, model.kernels)


def build_stage(config, dtype, mesh, parallel, read, kernels=None, use_flash_attention=None, use_paged_attention=None):
    """The share of the process at ``mesh``'s place.

    Args:
        config (TeleChatConfig): the whole model.
        dtype (str): of the weights.
        mesh (Mesh): this process's place.
        parallel (ParallelConfig): stages, sequence parallelism.
        read (callable): ``read(name, slices)`` → numpy array of that part of the whole parameter.
        kernels, use_flash_attention, use_paged_attention: as `choose_kernels` takes them.

    Returns:
        Stage
    """
    tensor, dtype = mesh.tensor, as_dtype(dtype)
    kernels = choose_kernels(config, dtype, kernels, use_flash_attention, use_paged_attention)
    layers = stage_layers(config, parallel)[mesh.pipeline.rank]
    first, last = layers[0] == 0, layers[-1] == config.n_layer - 1
    shapes = parameter_shapes(config)
    rows = vocabulary_rows(config, tensor.size)
    parameters, slices = {}, {}

    own = tuple(f"transformer.h.{layer}." for layer in layers)
    tensors = sum(".h." not in name or name.startswith(own) for name in shapes)
    progress = Progress("loading weights", tensors, "tensors")

    def make(name, shape):
        progress.advance()
        part = local_slices(name, shapes[name], tensor.rank, tensor.size)
        array = read(name, part)
        if is_vocabulary(name) and len(array) < rows:
            array = np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])
        slices[name] = part
        parameter = weight_parameters(array, dtype, kernels)
        if not isinstance(parameter, tuple):  # a quantised weight is nothing that is trained
            parameter.name = name
            parameters[name] = parameter
        return parameter

    make_inner = scope(make, "transformer")
    word_embeddings = ln_f = lm_head = None
    shape = block_shape(config, tensor.size)
    with progress:
        if first or (last and config.tie_word_embeddings):
            word_embeddings = Embedding(scope(make_inner, "word_embeddings"), rows, config.hidden_size, kernels)
        blocks = [Block(scope(make_inner, f"h.{layer}"), shape, kernels) for layer in layers]
        if last:
            ln_f = RMSNorm(scope(make_inner, "ln_f"), config.hidden_size, config.layer_norm_epsilon, kernels)
            if not config.tie_word_embeddings:
                lm_head = Linear(scope(make, "lm_head"), config.hidden_size, rows)
    for block in blocks:
        put_collectives(block.functions, tensor, parallel.sequence_parallel)
    return Stage(config, layers, blocks, word_embeddings, ln_f, lm_head, parameters, slices,
                 tensor.rank * rows, dtype, kernels)


def put_collectives(functions, tensor, sequence_parallel):
    """Surround a block's pairs of products with the collectives of tensor (and sequence) parallelism."""
    if tensor.size > 1:
        if sequence_parallel:
            functions.set_tensor_parallel(GatherRows(tensor), ScatterRows(tensor))
        else:
            functions.set_tensor_parallel(CopyTo(tensor), ReduceFrom(tensor))


def read_random(config, seed):
    """``read`` of `build_stage` for random weights, equal to those of one process."""
    shapes = parameter_shapes(config)
    return lambda name, slices: initial_tensor(config, seed, name, shapes[name])[slices]
