"""The peft package itself reads what training saves, onto modules named as the official torch models' are."""

import types

import numpy as np
import pytest
import torch

from telechat import TeleChat, TeleChatConfig, Trainer
from telechat.adapters.lora_config import LoraConfig
from telechat.adapters.modules import layer_prefix, modules_of
from telechat.adapters.peft import AdaptedReader
from telechat.adapters.trained import TrainedAdapter, read_initial
from telechat.checkpoint.layout import official_parameters
from telechat.training.training_state import save_training_checkpoint
from tests.adapters.test_training import RECIPE

SIZES = dict(vocab_size=96, hidden_size=32, n_layer=2, n_head=4, ffn_hidden_size=48, training_seqlen=64)
STYLES = {"7b": dict(tie_word_embeddings=True), "52b": dict(style="gpt2", use_bias=False, rotary_float16=False),
          "telechat3": dict(style="llama", use_bias=False, num_key_value_heads=2)}


class Official(torch.nn.Module):
    """Linear modules (of 52B Conv1D) and norms under official names, with a model's weights, and what peft asks of a model."""

    def __init__(self, config, tensors):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.config = types.SimpleNamespace(to_dict=dict, get=lambda name, default=None: default, tie_word_embeddings=False)
        for name, value in tensors.items():
            if name.endswith(".bias"):
                continue
            *parents, last = name.removesuffix(".weight").split(".")
            place = self
            for parent in parents:
                if not hasattr(place, parent):
                    place.add_module(parent, torch.nn.Module())
                place = getattr(place, parent)
            bias = tensors.get(name.removesuffix("weight") + "bias")
            if value.ndim == 1:
                module = torch.nn.RMSNorm(len(value))
            else:
                module = Conv1D(value.shape[1], value.shape[0]) if config.style == "gpt2" else torch.nn.Linear(
                    *value.shape[::-1], bias=bias is not None)
            module.weight.data = torch.tensor(value)
            if bias is not None:
                module.bias.data = torch.tensor(bias)
            place.add_module(last, module)

    def prepare_inputs_for_generation(self):
        raise NotImplementedError


@pytest.mark.parametrize("style", STYLES)
def test_peft_merges_the_weights_that_we_merge(tmp_path, style):
    peft = pytest.importorskip("peft")
    model = TeleChat(TeleChatConfig(**SIZES, **STYLES[style]))
    config, lora = model.config, LoraConfig(rank=3, alpha=5, rslora=style == "52b")
    model.save_pretrained(tmp_path / "base")
    trainer = Trainer(model, RECIPE, adapter=TrainedAdapter(config, lora, range(2), read_initial(config, lora, 0)))
    ids = np.random.default_rng(0).integers(0, 96, (2, 2, 16))
    for batch in ids:
        trainer.train_step(batch, batch)
    path = save_training_checkpoint(str(tmp_path / "run"), trainer, {})
    reader, targets = AdaptedReader(tmp_path / "base", path), {layer_prefix(config, layer) + module.name
                                                               for layer in range(2) for module in modules_of(config)}
    plain, wanted = {}, {}
    weights = {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}
    for stored in official_parameters(config):
        name = stored.name if stored.name.startswith(("transformer.", "model.")) else f"transformer.{stored.name}"
        if name.removesuffix(".weight") in targets and name.endswith(".weight"):
            plain[name] = np.ascontiguousarray(stored.join(*(weights[parameter] for parameter in stored.parameters)))
            wanted[name] = stored.join(*(reader.read(parameter) for parameter in stored.parameters))
    assert len(plain) == len(targets)
    loaded = peft.PeftModel.from_pretrained(Official(config, plain), path)
    merged = loaded.merge_and_unload().state_dict()
    for name, value in wanted.items():
        assert np.abs(value - plain[name]).max() > 1e-5, f"{name} has an adapter that does something"
        assert np.abs(merged[name].numpy() - value).max() < 1e-6, name
