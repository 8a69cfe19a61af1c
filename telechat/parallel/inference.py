"""A model cut over tensor-parallel ranks, with what generation needs of a `TeleChat`."""

import sys

from mindspore import nn
import mindspore as ms

from telechat.adapters.attached import Attachment
from telechat.adapters.peft import open_checkpoint
from telechat.adapters.unmerged import AdapterSet
from telechat.checkpoint.layout import parameter_shapes
from telechat.checkpoint.reader import read_as
from telechat.model import TeleChat, as_dtype
from telechat.nn.device import device_tensor
from telechat.nn.inference import use_inference_kernels
from telechat.nn.kernel_choice import cpu_obstacle
from telechat.nn.kernels import on_cpu
from telechat.nn.log import log_once
from telechat.parallel.collective_errors import run_on_all
from telechat.parallel.collectives import GatherRows, gather_objects
from telechat.parallel.mesh import Mesh
from telechat.parallel.parallel_config import ParallelConfig, process_count
from telechat.parallel.plan import check_mesh, local_slices, own_heads
from telechat.parallel.shared_memory import share_memory
from telechat.parallel.stage import build_stage
from telechat.parallel.vocabulary import embed_for


class _Transformer(nn.Cell):
    def __init__(self, stage):
        super().__init__(auto_prefix=False)
        self.word_embeddings = stage.word_embeddings
        self.h = nn.CellList(stage.blocks, auto_prefix=False)
        self.ln_f = stage.ln_f

    def construct(self, x):
        return x


class TensorParallelModel(nn.Cell):
    """This rank's share of a model; `Generator` takes it as it takes a `TeleChat`.

    Every rank must be given the same prompts and settings in the same order; each gets all logits.

    Args:
        stage (Stage): all layers, cut over ``tensor``.
        tensor (Group): the tensor-parallel ranks.

    Attributes:
        shared (tuple): as `Kernels.decode_step` takes it, where one operator computes the whole share; None elsewhere.
    """

    embeds_in_graphs = False  # a collective is part of it

    def __init__(self, stage, tensor):
        super().__init__(auto_prefix=False)
        self.config = stage.config
        self.kernels = stage.kernels
        self.compute_dtype = stage.compute_dtype
        self.transformer = _Transformer(stage)
        self.head_weight = stage.head_weight
        self.own_heads = own_heads(stage.config, tensor)
        self._embed = embed_for(stage, tensor, sequence_parallel=False)
        self._gather = GatherRows(tensor)
        self.shared = None

    def construct(self, x):
        return x

    def embed(self, input_ids):
        """int32 (B, S) → (B·S, H), the same on every rank."""
        return self._embed(input_ids.reshape(-1), None, self.transformer.word_embeddings.weight)

    def head(self, x):
        """(N, H) after the last block → float32 logits (N, V), the same on every rank."""
        logits = self.kernels.linear(self.transformer.ln_f(x), self.head_weight).astype(ms.float32)
        logits = self._gather(logits.transpose(1, 0)).transpose(1, 0)[:, :self.config.vocab_size]
        return logits if self.config.logits_scale == 1 else logits * self.config.logits_scale


def load_tensor_parallel(directory, dtype, mesh, parallel, kernels=None, lora=None, use_paged_attention=None):
    """Read this rank's part of a checkpoint directory, the adapter of the directory ``lora`` added or put beside.

    Raises:
        InputError: the model does not divide by the number of ranks, or files are missing or broken.
    """
    reader, beside = open_checkpoint(directory, lora)
    config = reader.config
    check_mesh(config, parallel)
    reader.check(parameter_shapes(config))
    stage = build_stage(config, dtype, mesh, parallel, lambda name, part: read_as(reader, name, dtype, part), kernels,
                        use_paged_attention=use_paged_attention)
    model = TensorParallelModel(stage, mesh.tensor)
    if beside is not None:
        Attachment(model, lambda name, shape: local_slices(name, shape, mesh.tensor.rank, mesh.tensor.size)).put(beside)
    return model


def load_for_inference(directory, dtype, lora=None, use_paged_attention=None):
    """The whole model, or under msrun this process's part of it; to be called once, before anything is computed.

    lora: directory of an adapter that is added to the weights, or put beside quantised ones; None. use_paged_attention: of `choose_kernels`.
    Where there are several, each says on stderr, and so in its log, where its place in the mesh is.

    Returns:
        (TeleChat or TensorParallelModel, Group): the model, and all processes.

    Raises:
        InputError: as `load_tensor_parallel` and `TeleChat.from_pretrained`.
    """
    use_inference_kernels()
    if on_cpu() and dtype != "float32" and cpu_obstacle(as_dtype(dtype)) is not None:
        log_once(f"{dtype} weights are converted at every use on a CPU, which answers several times as slowly (7 to 17 "
                 "measured) as with --dtype float32; that takes twice the memory")
    parallel = ParallelConfig(tensor=process_count())
    mesh = Mesh.create(parallel)
    if mesh.world.size == 1:
        return TeleChat.from_pretrained(directory, dtype, lora=lora, use_paged_attention=use_paged_attention), mesh.world
    print(mesh.describe(), file=sys.stderr, flush=True)  # the first one's output is the answer's alone
    model = run_on_all(lambda: load_tensor_parallel(directory, dtype, mesh, parallel, lora=lora,
                                                    use_paged_attention=use_paged_attention), mesh.world)
    model.shared = _shared(model, mesh.world) if on_cpu() else None
    return model, mesh.world


def _shared(model, world):
    """`TensorParallelModel.shared`: on one host, with the operators for CPUs on all processes."""
    size = model.kernels.shared_bytes(world.size)
    if not all(gather_objects(size, world)):
        return None
    memory = share_memory(size, world)
    return None if memory is None else (memory, world.rank, world.size)


def adapters_beside(model, adapters, world):
    """The `AdapterSet` of a model for inference, or of this process's part of it; None for no adapters.

    Args:
        model (TeleChat or TensorParallelModel): the base model.
        adapters (dict): name → `Adapter`.
        world (Group): the processes that share the model.

    Raises:
        InputError: as `AdapterSet`.
    """
    if not adapters:
        return None
    return AdapterSet(adapters, model.config, lambda array: device_tensor(array, model.compute_dtype),
                      lambda name, shape: local_slices(name, shape, world.rank, world.size))
