"""Runs whose memory test_memory.py reads off, which it has on_card.py run on the simulated card."""

import mindspore as ms
import numpy as np


def training_memory(values):
    """Takes three steps of a run, given as a dict with its model; the bytes that are expected of it."""
    from telechat.config import TeleChatConfig
    from telechat.parallel.mesh import Mesh
    from telechat.parallel.stage import build_stage, read_random
    from telechat.adapters.trained import TrainedAdapter, read_initial
    from telechat.quantization.checkpoint import with_settings
    from telechat.training import optimizer
    from telechat.training.lora_run import resolve_lora
    from telechat.training.memory import fullest_rank
    from telechat.training.run_config import RunConfig
    from telechat.training.trainer import Trainer

    optimizer.CHECKED_UPDATES = 0  # operators that do nothing change no weights
    config, bits = TeleChatConfig.from_dict(values.pop("model")), values.pop("bits", None)
    run, read, adapter = RunConfig.from_dict(values), read_random(config, 0), None
    if bits is not None:
        config = with_settings(config, {"bits": bits, "group_size": 128})
        read = quantised_random(config, bits, read)
    stage = build_stage(config, run.train.dtype, Mesh.single(), run.parallel, read)
    lora = resolve_lora(run, config)
    if lora is not None:
        adapter = TrainedAdapter(config, lora, range(config.n_layer), read_initial(config, lora, 0))
    trainer = Trainer(stage, run.train, run.parallel, adapter=adapter)
    ids = np.random.default_rng(0).integers(4, config.vocab_size, (run.batch_size, run.sequence_length + 1))
    for _ in range(3):
        trainer.train_step(ids, ids)
    return fullest_rank(config, run, run.sequence_length).peak


def quantised_random(config, bits, read):
    """``read`` of `build_stage` with the products rounded to the nearest of ``bits`` bits."""
    from telechat.checkpoint.products import is_product
    from telechat.quantization.rounding import round_to_nearest

    def quantised(name, part):
        array = read(name, part)
        return round_to_nearest(array, bits, 128).weight(bits, name) if is_product(name) else array
    return quantised


def generation_memory(fields, dtype, slots, length):
    """Reads prompts into two slots and decodes in all; the bytes that are expected of it."""
    from telechat.nn.inference import use_inference_kernels

    use_inference_kernels()
    from telechat import TeleChat, TeleChatConfig
    from telechat.generation.card_memory import card_memory
    from telechat.generation.engine import Engine

    config = TeleChatConfig.from_dict(fields)
    engine = Engine(TeleChat(config, dtype), length)
    engine.reserve(slots, length)
    prompt = [5] * (length - 8)
    for slot in (0, 1):
        engine.prefill([slot], [prompt])
    for step in range(2):
        engine.decode(range(slots), [5] * slots, [len(prompt) + step] * slots)
    return sum(card_memory(config, dtype, slots, length).values())


def default_cache(fields, dtype, slots, length):
    """What a server takes for a cache where the user names no size, and a run that fills it.

    Returns:
        (list, list, str): the plan; a card's bytes, those free before and after the cache was there, and the cache's; what is
        said of a cache twice the size.
    """
    from telechat.nn.inference import use_inference_kernels

    use_inference_kernels()
    from telechat import TeleChat, TeleChatConfig
    from telechat.generation.card_memory import card_bytes, plan_card_cache
    from telechat.generation.engine import Engine

    config = TeleChatConfig.from_dict(fields)
    engine = Engine(TeleChat(config, dtype), length)
    total, free = card_bytes()
    plan = plan_card_cache(config, dtype, slots, length, total, free)
    engine.reserve(plan.slots, plan.length, plan.blocks(engine.block_size))
    ms.runtime.synchronize()
    _, left = card_bytes()
    held = sum(tensor.nbytes for layer in engine._cache.layers for tensor in layer[2:])
    prompt, full = [5] * (plan.length - 8), plan.tokens // plan.length
    for slot in range(full):
        engine.begin(slot, prompt)
        assert engine.grow(slot, plan.length)
        engine.prefill([slot], [prompt])
    engine.decode(range(full), [5] * full, [len(prompt)] * full)
    said = ""
    try:
        engine.reserve(plan.slots, plan.length, 8 * plan.blocks(engine.block_size))
        ms.runtime.synchronize()
    except RuntimeError as error:
        said = str(error)
    return plan, [total, free, left, held], said
