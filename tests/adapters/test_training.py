"""Training LoRA adapters: what peft and the official code computed, what is held, and how it goes on."""

import dataclasses
import gc
import json
import math
import re

import mindspore as ms
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file, save_file

from telechat import InputError, TeleChat, TeleChatConfig, TrainConfig, Trainer
from telechat.adapters.directory import lora_of
from telechat.adapters.lora_config import LoraConfig
from telechat.adapters.peft import Adapter
from telechat.adapters.trained import TrainedAdapter, read_adapter, read_initial
from telechat.checkpoint.convert import torch_to_ms
from telechat.checkpoint.layout import parameter_shapes
from telechat.nn.dropout import LORA_INPUT, Place, dropout_mask
from telechat.nn.lora import PRODUCTS
from telechat.parallel.estimate_peak import stage_memory
from telechat.parallel.parallel_config import ParallelConfig
from telechat.training.lora_run import resolve_lora
from telechat.training.memory import workload_of
from telechat.training.run_config import RunConfig
from telechat.training.training_state import check_whole, restore, save_training_checkpoint
from tests.conftest import ROOT
from tests.test_model import small_config
from tests.torch_reference import TorchTeleChat, torch_adamw

RECIPE = TrainConfig(learning_rate=1e-3, warmup_steps=2, total_steps=8, betas=(0.9, 0.95), eps=1e-8,
                     weight_decay=0.1, max_grad_norm=1.0)


@pytest.fixture(scope="module")
def bases(shared, tmp_path_factory):
    """bases(model): the tiny published checkpoint in our layout, converted once."""
    made = {}

    def get(model):
        if model not in made:
            made[model] = tmp_path_factory.mktemp("base") / model
            torch_to_ms(shared / "reference" / f"{model}_tiny", made[model])
        return made[model]

    return get


def trainer_of(model, adapter_directory, train=RECIPE, parallel=None, dropout=0.0):
    """A trainer that goes on with a saved adapter."""
    adapter = Adapter(adapter_directory, model.config)
    lora = lora_of(adapter, model.config, dropout)
    trained = TrainedAdapter(model.config, lora, range(model.config.n_layer), read_adapter(adapter, model.config, lora))
    return Trainer(model, train, parallel, adapter=trained)


@pytest.mark.parametrize("micro_batches, recompute", [(1, False), (2, True)])
def test_the_trace_and_the_adapter_that_peft_trains(shared, bases, micro_batches, recompute):
    golden = np.load(shared / "reference/lora_12b/golden.npz")
    model = TeleChat.from_pretrained(bases("telechat_12b"))
    before = {parameter.name: parameter.asnumpy().copy() for parameter in model.get_parameters()}
    trainer = trainer_of(model, shared / "reference/lora_12b/adapter_a",
                         dataclasses.replace(RECIPE, micro_batches=micro_batches), ParallelConfig(recompute=recompute))
    for step in range(8):
        result = trainer.train_step(golden["train_input_ids"][step], golden["train_labels"][step])
        assert result.loss == pytest.approx(golden["train_loss"][step], rel=1e-5)
        assert result.grad_norm == pytest.approx(golden["train_grad_norm"][step], rel=1e-5)
        assert result.learning_rate == pytest.approx(golden["train_lr"][step], rel=1e-6)
    after = Adapter(shared / "reference/lora_12b/adapter_a_after", model.config)
    expected = read_adapter(after, model.config, trainer.adapter.lora)
    for name, parameter in trainer.adapter.parameters.items():
        assert np.abs(parameter.asnumpy() - expected(name, trainer.adapter.slices[name])).max() < 1e-5, name
    assert all(np.array_equal(parameter.asnumpy(), before[parameter.name]) for parameter in model.get_parameters())


class AdaptedWeight:
    """In the place of a weight of `TorchTeleChat`: x @ weight.T is Wx + s·B(A(x·mask)); 52B's has no ``.T``."""

    def __init__(self, weight, a, b, scale, mask, transposed):
        self.weight, self.a, self.b, self.scale, self.mask = weight if transposed else weight.T, a, b, scale, mask

    @property
    def T(self):
        return self

    def __rmatmul__(self, x):
        return x @ self.weight + self.scale * ((x if self.mask is None else x * self.mask) @ self.a.T @ self.b.T)


def official_state(directory):
    """Name → float32 tensor of a published checkpoint."""
    state = {}
    for file in sorted(directory.glob("*.bin")):
        state.update(torch.load(file, weights_only=True))
    for file in sorted(directory.glob("*.safetensors")):
        state.update(safetensors.torch.load_file(file))
    return {name: tensor.float() for name, tensor in state.items()}


def random_adapter(folder, state, config, modules, rank, **settings):
    """An adapter as peft saves it, of all modules whose names end so; B is not zero. Returns its tensors by module."""
    random, pairs, tensors = np.random.default_rng(3), {}, {}
    for name, weight in state.items():
        module = name.removesuffix(".weight")
        if not module.endswith(modules) or weight.ndim != 2:
            continue
        outputs, inputs = weight.shape[::-1] if config.style == "gpt2" else weight.shape
        pairs[module] = [(random.standard_normal(shape) * 0.1).astype(np.float32) for shape in ((rank, inputs), (outputs, rank))]
        full = module if module.startswith(("transformer.", "model.")) else f"transformer.{module}"
        for part, array in zip("AB", pairs[module]):
            tensors[f"base_model.model.{full}.lora_{part}.weight"] = array
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, **settings}))
    return pairs


# Official modules, and the product whose stream each one's dropout masks are drawn from.
STREAMS = {"query": "query", "key_value": "key_value", "dense": "dense", "attn.c_attn": "query", "attn.c_proj": "dense",
           "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "dense", "c_fc": "gate_proj",
           "mlp.c_proj": "down_proj", "gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}


@pytest.mark.parametrize("name, modules, rslora", [
    ("telechat_7b", ("query", "dense", "gate_proj", "down_proj"), True),
    ("telechat_52b", ("c_attn", "c_proj", "c_fc"), False),
    ("telechat2", ("key_value", "up_proj"), False),
    ("telechat3", ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"), True),
])
def test_every_layout_against_torch_with_dropout(shared, bases, tmp_path, name, modules, rslora):
    """Three steps with torch's own gradients and AdamW, of the official modules and of the masks that we document."""
    official, model = shared / "reference" / f"{name}_tiny", TeleChat.from_pretrained(bases(name))
    state = official_state(official)
    alpha, rate, train = 6, 0.25, dataclasses.replace(RECIPE, seed=5, warmup_steps=0)
    pairs = random_adapter(tmp_path / "adapter", state, model.config, modules, 3, lora_alpha=alpha, use_rslora=rslora)
    trainer = trainer_of(model, tmp_path / "adapter", train, dropout=rate)
    theirs = {f"{module} {part}": torch.tensor(array, requires_grad=True)
              for module, pair in pairs.items() for part, array in zip("AB", pair)}
    optimizer = torch_adamw(theirs, 0.1)
    scale, ids = alpha / (3 ** 0.5 if rslora else 3), np.load(official / "golden.npz")["train_input_ids"]
    config = json.loads((official / "config.json").read_text())
    for step in range(3):
        tensors = dict(state)
        for module in pairs:
            layer = int(re.search(r"\.?(?:h|layers)\.(\d+)\.", module)[1])
            stream = LORA_INPUT + PRODUCTS.index(next(product for end, product in STREAMS.items() if module.endswith(end)))
            a, b = (theirs[f"{module} {part}"] for part in "AB")
            masks = dropout_mask(ids.shape[2] - 1, a.shape[1], rate, Place(5, step, range(2), layer), [stream])[:, 0]
            masks = np.concatenate((masks, np.zeros_like(masks[:, :1])), 1)  # the last token predicts nothing
            tensors[f"{module}.weight"] = AdaptedWeight(state[f"{module}.weight"], a, b, scale, torch.tensor(masks),
                                                        model.config.style == "gpt2")
        loss = TorchTeleChat(config, tensors).loss(torch.tensor(ids[step]).long(), torch.tensor(ids[step]).long())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        result = trainer.train_step(ids[step], ids[step])
        for group in optimizer.param_groups:
            group["lr"] = result.learning_rate
        optimizer.step()
        assert result.loss == pytest.approx(loss.item(), rel=2e-5)
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    saved = load_file(f"{save_training_checkpoint(str(tmp_path / 'run'), trainer, {})}/adapter_model.safetensors")
    assert len(saved) == len(theirs)
    for key, tensor in theirs.items():
        module, part = key.split()
        found = next(array for full, array in saved.items() if full.endswith(f"{module}.lora_{part}.weight"))
        # Of a gradient near 0 rounding decides what Adam makes: a tenth of a step.
        assert np.abs(found - tensor.detach().numpy()).max() < 1e-4, key


def held_bytes():
    """Bytes of all of MindSpore's tensors that Python holds, each memory counted once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), ms.Tensor)]  # proxies are no such type
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@pytest.mark.parametrize("dtype, width", [("float32", 4), ("bfloat16", 2)])
def test_nothing_is_held_of_frozen_weights_but_themselves(dtype, width):
    """After a step there are the weights in their dtype, and of the adapter itself, two moments; no gradients, no masters."""
    before = held_bytes()
    model = TeleChat(small_config(), dtype=dtype)
    lora = LoraConfig(rank=2, targets=("query", "down_proj"))
    adapter = TrainedAdapter(model.config, lora, range(2), read_initial(model.config, lora, 0))
    trainer = Trainer(model, dataclasses.replace(RECIPE, dtype=dtype), adapter=adapter)
    ids = np.random.default_rng(0).integers(0, 96, (2, 24))
    trainer.train_step(ids, ids)
    weights = sum(parameter.size for parameter in model.get_parameters())
    trained = sum(parameter.size for parameter in adapter.parameters.values())
    tables = sum(table.nbytes for tables in trainer.compute._positions.values() for table in tables if table is not None)
    assert 50 * trained < weights * width
    assert held_bytes() - before <= weights * width + 3 * 4 * trained + tables + 4096
    assert {str(parameter.dtype) for parameter in model.get_parameters()} == {"Float32" if width == 4 else "BFloat16"}


def test_a_run_that_goes_on_is_the_same_to_the_last_bit(tmp_path):
    """From a checkpoint after two of four steps, with dropout; and from its PEFT directory the same adapter is read."""
    ids = np.random.default_rng(0).integers(0, 96, (4, 2, 24))
    lora = LoraConfig(rank=3, dropout=0.2)

    def trainer(seed=0):
        model = TeleChat(small_config())
        return Trainer(model, RECIPE, adapter=TrainedAdapter(model.config, lora, range(2),
                                                             read_initial(model.config, lora, seed)))

    whole, first, second = trainer(), trainer(), trainer(seed=1)
    steps = [whole.train_step(batch, batch) for batch in ids]
    assert [first.train_step(batch, batch) for batch in ids[:2]] == steps[:2]
    path = save_training_checkpoint(str(tmp_path), first, {"lora": lora.to_dict()})
    check_whole(path)
    restore(path, second, {"lora": lora.to_dict()})
    assert [second.train_step(batch, batch) for batch in ids[2:]] == steps[2:]
    for one, other in zip(whole.adapter.parameters.values(), second.adapter.parameters.values(), strict=True):
        assert np.array_equal(one.asnumpy(), other.asnumpy())
    with pytest.raises(InputError, match="was written with lora.rank 3, this run has 4"):
        restore(path, second, {"lora": dataclasses.replace(lora, rank=4).to_dict()})
    saved = Adapter(path, first.model.config)
    assert lora_of(saved, first.model.config) == lora, "its dropout, too"
    assert resolve_lora(RunConfig.from_dict({"load_lora": path}), first.model.config) == lora
    assert lora_of(saved, first.model.config, 0.1) == dataclasses.replace(lora, dropout=0.1)
    read = read_adapter(saved, first.model.config, lora)
    for name, parameter in first.adapter.parameters.items():
        assert np.array_equal(read(name, (slice(None), slice(None))), parameter.asnumpy())


def test_a_new_adapter_begins_as_pefts_does():
    config, lora = small_config(), LoraConfig(rank=8, targets=("down_proj",))
    read = read_initial(config, lora, 7)
    name = "transformer.h.1.mlp.down_proj.lora_A.weight"
    a = read(name, (slice(None), slice(None)))
    inputs = config.ffn_hidden_size
    assert a.shape == (8, inputs) and np.abs(a).max() <= inputs ** -0.5
    assert abs(a.std() - (3 * inputs) ** -0.5) < 0.1 * a.std(), "uniform within 1/√inputs"
    assert np.array_equal(read(name, (slice(2, 5), slice(1, 9))), a[2:5, 1:9])
    assert not np.array_equal(a, read(name.replace("h.1", "h.0"), (slice(None), slice(None))))
    assert not read(name.replace("lora_A", "lora_B"), (slice(None), slice(None))).any()


@pytest.mark.parametrize("kernels, bits, dtype, tolerance", [("cpu", 4, "float32", 1e-3), ("portable", 8, "float32", 1e-3),
                                                             ("cpu", 4, "bfloat16", 1e-2), ("cpu", 8, "bfloat16", 1e-2)])
def test_beside_quantised_products_training_is_that_beside_the_dequantised_ones(shared, tmp_path, kernels, bits, dtype, tolerance):
    """QLoRA (arXiv:2305.14314): the base's products stay packed; the converter rounds the dequantised ones to float16."""
    lora, steps, models, recipe = LoraConfig(rank=4), [], [], dataclasses.replace(RECIPE, dtype=dtype)
    for name, dequantize in (("packed", False), ("whole", True)):
        torch_to_ms(shared / f"reference/gptq_12b_{bits}bit_tiny", tmp_path / name, dequantize=dequantize)
        models.append(TeleChat.from_pretrained(tmp_path / name, dtype, kernels=kernels if name == "packed" else None))
        config = models[-1].config
        adapter = TrainedAdapter(config, lora, range(config.n_layer), read_initial(config, lora, 0))
        trainer = Trainer(models[-1], recipe, adapter=adapter)
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (3, 2, 24))
        steps.append([[result.loss, result.grad_norm] for result in (trainer.train_step(batch, batch) for batch in ids)])
    assert np.allclose(*steps, rtol=tolerance, atol=0) and steps[0][0] != steps[0][2]
    sizes = [sum(parameter.nbytes for parameter in model.transformer.h.get_parameters()) for model in models]
    assert sizes[0] < bits / (28 if dtype == "float32" else 14) * sizes[1]
    with pytest.raises(InputError, match="quantised and cannot be trained themselves; train an adapter beside them"):
        Trainer(models[0], recipe)


def test_the_estimate_of_the_12b_recipe_is_of_what_is_held():
    """Weights in bfloat16, the adapter, two moments and its gradients in float32; it fits a card of 64 GB."""
    run = RunConfig.load(str(ROOT / "configs/lora_12b.yaml"))
    config = TeleChatConfig.from_dict(run.published_model)
    step = workload_of(config, run, run.sequence_length)
    memory = stage_memory(config, ParallelConfig(data=1), step, 0)
    weights = sum(map(math.prod, parameter_shapes(config).values()))
    # Per layer and unit of rank: inputs and outputs of six products.
    adapter = 16 * config.n_layer * (2 * 5120 + 3 * 5120 + 2 * 5120 + 3 * (5120 + 12288))
    assert memory.weights == 2 * weights + 4 * adapter
    assert memory.optimizer == 2 * 4 * adapter and memory.gradients == 4 * adapter
    assert 2 * weights < memory.peak < 40e9
