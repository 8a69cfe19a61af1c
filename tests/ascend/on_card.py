"""What the tests run on the simulated card, in a process of its own: on_card.py FUNCTION ARGUMENTS.json RESULT.json."""

import json
import sys

import mindspore as ms
import numpy as np

RECIPE = dict(learning_rate=1e-3, warmup_steps=2, total_steps=8, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1)
SIZES = dict(vocab_size=96, hidden_size=64, n_layer=2, n_head=4, ffn_hidden_size=48, initializer_range=0.2)
PADDING = 6  # of the first sequence
DOCUMENTS = np.repeat([[0, 1, 2], [0, 1, 2]], [5, 3, 25, 9, 14, 10]).reshape(2, 33)
# Fields of the config and of TrainConfig, and whether the batch has documents.
FEATURES = {
    "grouped heads": (dict(num_key_value_heads=2), {}, False),
    "padding": ({}, dict(mask_padding=True), False),
    "documents": ({}, dict(document_mask=True, restart_positions=True), True),
    "ALiBi": (dict(position_embedding="alibi"), {}, False),
    "documents and ALiBi": (dict(position_embedding="alibi"), dict(document_mask=True), True),
    "tied, two micro-batches": (dict(tie_word_embeddings=True), dict(micro_batches=2), False),
    "dropout": (dict(hidden_dropout=0.1, attention_dropout=0.1, embedding_dropout=0.1), {}, False),
    "documents and dropout": (dict(hidden_dropout=0.1, attention_dropout=0.1), dict(document_mask=True), True),
    "ALiBi and dropout": (dict(position_embedding="alibi", attention_dropout=0.1), {}, False),
    "documents, ALiBi and dropout": (dict(position_embedding="alibi", attention_dropout=0.1), dict(document_mask=True), True),
}


def trace(trainer, batches):
    """[loss, norm] of each step."""
    return [[result.loss, result.grad_norm] for result in (trainer.train_step(*batch) for batch in batches)]


def training(directory, golden, dtypes):
    """For each dtype: logits, those of a left-padded sequence, the trace of 8 steps, the logits after them."""
    from telechat import TeleChat, TrainConfig, Trainer

    golden, results = np.load(golden), {}
    for dtype in dtypes:
        model = TeleChat.from_pretrained(directory, dtype)
        found = {"logits": model(golden["input_ids"]).asnumpy().tolist()}
        if "padded_ids" in golden:
            ids = golden["padded_ids"]
            shown = np.arange(ids.shape[1]) >= ids.shape[1] - golden["padded_logits"].shape[1]
            logits = model(ids, np.broadcast_to(shown, ids.shape).astype(np.int32)).asnumpy()
            found["padded_logits"] = logits[:, shown].tolist()
        trainer = Trainer(model, TrainConfig(**RECIPE, dtype=dtype))
        found["trace"] = trace(trainer, zip(golden["train_input_ids"], golden["train_labels"]))
        found["train_logits_after"] = model(golden["train_input_ids"][0]).asnumpy().tolist()
        results[dtype] = found
    return results


def adapter_training(directory, adapter, golden, dtypes):
    """For each dtype the trace of 8 steps of training an adapter beside frozen weights."""
    from telechat import TeleChat, TrainConfig, Trainer
    from telechat.adapters.directory import lora_of
    from telechat.adapters.peft import Adapter
    from telechat.adapters.trained import TrainedAdapter, read_adapter

    golden, results = np.load(golden), {}
    for dtype in dtypes:
        model = TeleChat.from_pretrained(directory, dtype)
        saved = Adapter(adapter, model.config)
        lora = lora_of(saved, model.config)
        trained = TrainedAdapter(model.config, lora, range(model.config.n_layer), read_adapter(saved, model.config, lora))
        trainer = Trainer(model, TrainConfig(**RECIPE, dtype=dtype), adapter=trained)
        results[dtype] = trace(trainer, zip(golden["train_input_ids"], golden["train_labels"]))
    return results


def generation(directory, prompts, count, dtype, paged=None, speculate=0):
    """Greedy answers, two at a time; the kernels that gave them; and how far off a prompt is that is read in parts."""
    from telechat.nn.inference import use_inference_kernels

    use_inference_kernels()
    from telechat import Generator, SamplingParams, TeleChat

    model = TeleChat.from_pretrained(directory, dtype, use_paged_attention=paged)
    generator = Generator(model, max_length=64, batch_size=2, speculate=speculate)
    answers = generator.generate(prompts, SamplingParams(count))
    parts = parts_and_whole(model, prompts[:2]) if min(map(len, prompts)) > 7 else None  # its parts are of 3 and 4 tokens
    return {"kernels": model.kernels.describe(), "answers": answers, "parts": parts}


def parts_and_whole(model, prompts):
    """Two prompts in parts of different lengths against each in one go: the largest difference by the largest logit."""
    from telechat.generation.engine import Engine

    engine = Engine(model, 64)
    engine.reserve(2, 64)
    whole = engine.prefill([0, 1], prompts)
    for slot, prompt in enumerate(prompts):
        engine.begin(slot, prompt)
        engine.grow(slot, len(prompt))
    cuts = [(0, 4), (3, 7)]
    for slot, cut in enumerate(cuts):
        if cut[0]:
            engine.prefill([slot], [prompts[slot][:cut[0]]], [0])
        engine.prefill([slot], [prompts[slot][cut[0]:cut[1]]], [cut[0]])
    parts = engine.prefill([0, 1], [prompt[cut[1]:] for prompt, cut in zip(prompts, cuts)], [cut[1] for cut in cuts])
    return float(np.abs(parts - whole).max() / np.abs(whole).max())


def adapted(directory, adapters, prompts, dtype, lora=None):
    """Logits behind each prompt and its next token, rows with adapters and without in one call, and the kernels.

    lora: the directory of an adapter that all rows have, where none has one of its own.
    """
    from telechat.nn.inference import use_inference_kernels

    use_inference_kernels()
    from telechat import TeleChat
    from telechat.adapters.peft import Adapter
    from telechat.generation.engine import Engine
    from telechat.parallel.inference import adapters_beside
    from telechat.parallel.mesh import Group

    model = TeleChat.from_pretrained(directory, dtype, lora=lora)
    made = {name: Adapter(name, model.config) for name in set(adapters) - {None}}
    engine = Engine(model, 64, adapters=adapters_beside(model, made, Group(None, (0,), 0, 1)))
    slots = range(len(prompts))
    engine.reserve(len(prompts), 64)
    for slot in slots:
        engine.begin(slot, prompts[slot], adapter=adapters[slot])
        engine.grow(slot, len(prompts[slot]) + 1)
    logits = engine.prefill(slots, prompts, [0] * len(prompts))
    more = engine.decode(slots, [5] * len(prompts), list(map(len, prompts)))
    return {"kernels": model.kernels.describe(), "logits": np.stack([logits, more]).tolist()}


def serving(directory, requests, dtype, slots, blocks, chunk, speculate):
    """What a server's batch answers on a cache of so many blocks, and what it counted.

    requests (list): [prompt, adapter or None, keyword arguments of SamplingParams] each.
    """
    from telechat.nn.inference import use_inference_kernels

    use_inference_kernels()
    from telechat import SamplingParams, TeleChat
    from telechat.adapters.peft import Adapter
    from telechat.generation.batch import Batch
    from telechat.generation.engine import Engine
    from telechat.parallel.inference import adapters_beside
    from telechat.parallel.mesh import Group

    model = TeleChat.from_pretrained(directory, dtype)
    made = {name: Adapter(name, model.config) for _, name, _ in requests if name}
    beside = adapters_beside(model, made, Group(None, (0,), 0, 1)) if made else None
    engine = Engine(model, 288, guesses=speculate, adapters=beside)
    engine.reserve(slots, 288, blocks)
    read, reads = engine.prefill, []
    engine.prefill = lambda *arguments: reads.append(arguments[0]) or read(*arguments)
    batch, answers = Batch(engine, chunk, speculate), [[] for _ in requests]
    for key, (prompt, adapter, settings) in enumerate(requests):
        batch.add(key, prompt, SamplingParams(**settings), adapter=adapter)
    while len(batch):
        for step in batch.prefill() + batch.decode():
            answers[step.key].append(step.token)
    return {"kernels": model.kernels.describe(), "answers": answers, "preemptions": batch.preemptions, "right": batch.right,
            "hits": engine.table.hits, "free": engine.available, "block": engine.block_size, "reads": reads}


def features(names, dtype):
    """Three steps with each of `FEATURES`: [loss, norm] of each, and the loss scale after them."""
    return {name: feature(name, dtype) for name in names}


def feature(name, dtype):
    """Three steps on whatever device this process has."""
    from telechat import TeleChat, TeleChatConfig, TrainConfig, Trainer

    fields, settings, packed = FEATURES[name]
    ids = np.random.default_rng(0).integers(4, 96, (2, 33))
    ids[0, :PADDING] = 3
    model = TeleChat(TeleChatConfig(**{**SIZES, **fields}), dtype)
    train = TrainConfig(learning_rate=1e-2, lr_schedule="constant", total_steps=4, dtype=dtype, **settings)
    return trace(Trainer(model, train), [(ids, ids, DOCUMENTS if packed else None)] * 3)


def dropout(dtype, masks=None):
    """Traces of two steps with dropout, of two micro-batches, without recomputation and with it, and the masks that were used.

    masks (dict): those to use, as another process returned them; None: what the kernels draw, each time the same.
    """
    from telechat import TeleChat, TeleChatConfig, TrainConfig, Trainer
    from telechat.nn.ascend import AscendKernels
    from telechat.nn.kernels import Kernels
    from telechat.nn.self_test import kept_factors
    from telechat.parallel.parallel_config import ParallelConfig

    computing = AscendKernels if masks is None else Kernels
    drawn, attention, output = {}, computing.attention_dropout, computing.output_dropout

    def used(factors, key, place):
        key = f"{key} {place.step} {list(place.sequences)} {place.layer}"
        if masks is not None:
            return ms.Tensor(np.array(masks[key], np.float32))
        array = factors() if callable(factors) else factors.astype(ms.float32).asnumpy()
        assert np.array_equal(drawn.setdefault(key, array), array), f"{key}: other bits than before"
        return None

    def attention_dropout(self, length, rate, place, heads):
        own = None if masks else attention(self, length, rate, place, heads)
        given = used(lambda: kept_factors(own, length, rate, place, heads), "attention", place)
        return own if given is None else given

    def output_dropout(self, length, width, rate, place, stream):
        if rate == 0:
            return None
        own = None if masks else output(self, length, width, rate, place, stream)
        given = used(own, stream, place)
        return own if given is None else given

    computing.attention_dropout, computing.output_dropout = attention_dropout, output_dropout
    try:
        traces, ids = [], np.random.default_rng(0).integers(4, 96, (4, 33))
        for recompute in (False, True):
            model = TeleChat(TeleChatConfig(**SIZES, hidden_dropout=0.1, attention_dropout=0.2), dtype,
                             kernels=None if masks is None else "portable")
            train = TrainConfig(learning_rate=1e-2, lr_schedule="constant", total_steps=4, dtype=dtype, micro_batches=2)
            traces.append(trace(Trainer(model, train, ParallelConfig(recompute=recompute)), [(ids, ids)] * 2))
    finally:
        computing.attention_dropout, computing.output_dropout = attention, output
    return {"traces": traces, "masks": {key: array.tolist() for key, array in drawn.items()}}


def overflows(scales):
    """For each first loss scale in float16: [loss, norm, scale, overflows, skipped] of two steps, then what a step that is
    not finite changes: whether it was skipped, updates, the scale, and how many weights."""
    from telechat import TeleChat, TeleChatConfig, TrainConfig, Trainer

    ids, results = np.random.default_rng(0).integers(4, 96, (2, 33)), []
    for scale in scales:
        train = TrainConfig(learning_rate=1e-2, lr_schedule="constant", total_steps=4, dtype="float16", loss_scale=scale)
        trainer = Trainer(TeleChat(TeleChatConfig(**SIZES), "float16"), train)
        taken = [trainer.train_step(ids, ids) for _ in range(2)]
        results.append([[step.loss, step.grad_norm, step.loss_scale, step.overflows, step.skipped] for step in taken])
    weights = trainer.stage.parameters
    next(iter(weights.values())).set_data(ms.Tensor(np.full((96, 64), np.inf, np.float16)))
    before = {name: weight.asnumpy().copy() for name, weight in weights.items()}
    step = trainer.train_step(ids, ids)
    changed = sum(not np.array_equal(before[name], weight.asnumpy(), equal_nan=True) for name, weight in weights.items())
    return results, [step.skipped, trainer.optimizer.updates, trainer.loss_scale.value, changed]


def steps(count, dtype):
    """Losses of training steps on 2 sequences of 32 tokens, nothing clipped; a budget is counted from the log."""
    from telechat import TeleChat, TeleChatConfig, TrainConfig, Trainer

    ids = np.random.default_rng(0).integers(4, 96, (2, 33))
    train = TrainConfig(learning_rate=1e-2, lr_schedule="constant", total_steps=count, dtype=dtype,
                        max_grad_norm=0.0)
    return trace(Trainer(TeleChat(TeleChatConfig(**{**SIZES, "n_layer": 3}), dtype), train), [(ids, ids)] * count)


def faults(dtype):
    """What is said where weights are left in host memory: by the check of placement, and without it."""
    from telechat import InputError, TeleChat, TeleChatConfig, TrainConfig, Trainer
    from telechat.nn import device
    from telechat.training import trainer as trainer_module
    from telechat.training.update_check import UpdateLost

    said, ids = [], np.random.default_rng(0).integers(4, 96, (2, 17))
    device.move_to_device = lambda parameter: parameter
    train = TrainConfig(learning_rate=1e-2, lr_schedule="constant", total_steps=4, dtype=dtype)
    try:
        Trainer(TeleChat(TeleChatConfig(**SIZES), dtype), train)
    except InputError as error:
        said.append(str(error))
    trainer_module.check_placement = lambda tensors: None
    try:
        Trainer(TeleChat(TeleChatConfig(**SIZES), dtype), train).train_step(ids, ids)
    except UpdateLost as error:
        said.append(str(error))
    return said


def limits():
    """Of each limit of CANN's operations that our calls stay within: what the card says to a call that does not, and to ours.

    {name: [sentence or None of the wrong call, the same of ours]}. What ours do beside calling an operation is laid out here:
    casts, other layouts, a step of one element, masks of whole groups of 128 bits.
    """
    from mindspore import Tensor, ops

    from telechat.nn import ascend_kernels as ascend
    from telechat.nn.ascend import AscendKernels

    def ones(*shape, dtype=ms.bfloat16):
        return ops.ones(shape, dtype)

    def said(call):
        try:
            results = call()
            for result in results if isinstance(results, (tuple, list)) else [results]:
                result.asnumpy()
        except (RuntimeError, ValueError, TypeError) as error:
            return str(error)
        return None

    def adamw(step=(0.0,), step_dtype=ms.float32, moments=ms.float32, master=ms.float32, gradient=ms.bfloat16):
        scalars = [Tensor(step, step_dtype), *ascend.adamw_scalars(1, 0.1, (0.9, 0.95), 1e-8, 0.1)[1:6]]
        return ascend.adamw(ones(4, 4, dtype=master), ones(4, 4, dtype=moments), ones(4, 4, dtype=moments),
                            ones(4, 4, dtype=gradient), *scalars)

    kernels, labels, odd = AscendKernels(ms.bfloat16), Tensor([3, 10], ms.int32), (3, 5)
    losses, weights = ones(2, 11, dtype=ms.float32), ones(2, dtype=ms.float32)
    table, wide = ones(1, 1, 2, 32), ones(1, 1, 2, 32, dtype=ms.float32)
    bits = ascend.dropout_bits(8, 24, 0.1, [1], ms.bfloat16)
    calls = {
        "heads before few tokens": (lambda: ascend.rotate(ones(2, 20, 2, 32), table, table),
                                    lambda: kernels.rotate(ones(2, 2, 20, 32), table, table)),
        "rotary tables of another dtype": (lambda: ascend.rotate(ones(1, 2, 4, 32), *[wide.reshape(1, 2, 1, 32)] * 2),
                                           lambda: ascend.rotate(ones(1, 2, 4, 32), *[kernels.rotary_tensor(
                                               np.ones((1, 2, 1, 32), np.float32))] * 2)),
        "labels of 32 bits": (lambda: ascend._cross_entropy(losses, labels, None, "none", -100, 0.0, 0.0, False),
                              lambda: ascend.token_cross_entropy(losses, labels, weights)),
        "gradients of another dtype than the logits": (
            lambda: ascend._cross_entropy_gradient(weights.astype(ms.bfloat16), losses, labels.astype(ms.int64), None, None,
                                                   None, "none", -100, 0.0, 0.0),
            lambda: ascend.token_cross_entropy(losses.astype(ms.bfloat16), labels, weights)),
        "a step of several elements": (lambda: adamw([0.0, 0.0]), adamw),
        "a step of 32 bits": (lambda: adamw([0], ms.int32), lambda: adamw([0], ms.int64)),
        "moments of another dtype": (lambda: adamw(moments=ms.bfloat16), lambda: adamw(gradient=ms.float16)),
        "a gradient wider than the weight": (lambda: adamw(master=ms.bfloat16, moments=ms.bfloat16, gradient=ms.float32),
                                             lambda: adamw(gradient=ms.float32)),
        "a dropout mask cut at its bytes": (lambda: ascend._apply_bits(ones(8, 24), bits[0], 0.1),
                                            lambda: ascend.dropout_mask(8, 24, 0.1, [1], ms.bfloat16)),
        "a rate above 1": (lambda: ascend.dropout_bits(8, 24, 1.5, [1], ms.bfloat16),
                           lambda: ascend.dropout_bits(8, 24, 0.5, [1], ms.bfloat16)),
        "a dropout mask for whole numbers": (lambda: ascend.dropout_mask(8, 24, 0.1, [1], ms.int32),
                                             lambda: ascend.dropout_mask(8, 24, 0.1, [1], ms.float16)),
        "a norm's weight narrower than its input": (
            lambda: ascend.rms_norm(ones(2, 32, dtype=ms.float32), ones(32), 1e-5),
            lambda: ascend.rms_norm(ones(2, 32), ones(32, dtype=ms.float32), 1e-5)),
        "a norm's weight of another width": (lambda: ascend.rms_norm(ones(2, 32), ones(16), 1e-5),
                                             lambda: ascend.rms_norm(ones(2, 32), ones(32), 1e-5)),
        "a sum of two dtypes in a norm": (lambda: ascend.add_rms_norm(ones(2, 32), ones(2, 32, dtype=ms.float32), ones(32), 1e-5),
                                          lambda: ascend.add_rms_norm(ones(2, 32), ones(2, 32), ones(32), 1e-5)),
        "halves that are none": (lambda: ops.swiglu(ones(*odd), -1), lambda: ascend.swiglu(ones(*odd), ones(*odd))),
        "factors of two dtypes": (lambda: ascend._matmul(ones(2, 32), ones(8, 32, dtype=ms.float32)),
                                  lambda: ascend.linear(ones(2, 32), ones(8, 32, dtype=ms.float32), None)),
    }
    return {name: [said(wrong), said(ours)] for name, (wrong, ours) in calls.items()}


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


if __name__ == "__main__":
    ms.set_device("Ascend")
    with open(sys.argv[2]) as file:
        arguments = json.load(file)
    answer = globals()[sys.argv[1]](*arguments)
    with open(sys.argv[3], "w") as file:
        json.dump(answer, file)
