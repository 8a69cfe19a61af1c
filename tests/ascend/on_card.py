"""What the tests run on the simulated card, in a process of its own: on_card.py FUNCTION ARGUMENTS.json RESULT.json.

A function of another file of this folder is FILE.FUNCTION.
"""

import importlib
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


def steps(count, dtype, clip, *segment_ids):
    """Losses of training steps on 2 sequences of 32 tokens; a budget is counted from the log. clip: 0 for none."""
    from telechat import TeleChat, TeleChatConfig, TrainConfig, Trainer

    ids = np.random.default_rng(0).integers(4, 96, (2, 33))
    train = TrainConfig(learning_rate=1e-2, lr_schedule="constant", total_steps=count, dtype=dtype,
                        max_grad_norm=clip)
    return trace(Trainer(TeleChat(TeleChatConfig(**{**SIZES, "n_layer": 3}), dtype), train),
                 [(ids, ids, *map(np.array, segment_ids))] * count)


def wide_head(vocab_size, length):
    """Two training steps of a sequence through a shallow model with a large vocabulary."""
    from telechat import TeleChat, TeleChatConfig, TrainConfig, Trainer
    from telechat.training import optimizer

    optimizer.CHECKED_UPDATES = 0  # operators that do nothing change no weights
    ids = np.random.default_rng(0).integers(4, vocab_size, (1, length + 1))
    model = TeleChat(TeleChatConfig(**{**SIZES, "vocab_size": vocab_size, "n_layer": 1}), "bfloat16")
    trainer = Trainer(model, TrainConfig(learning_rate=1e-2, lr_schedule="constant", total_steps=2, dtype="bfloat16"))
    trace(trainer, [(ids, ids)] * 2)


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


if __name__ == "__main__":
    ms.set_device("Ascend")
    with open(sys.argv[2]) as file:
        arguments = json.load(file)
    module, _, function = sys.argv[1].rpartition(".")
    answer = getattr(importlib.import_module(f"tests.ascend.{module or 'on_card'}"), function)(*arguments)
    with open(sys.argv[3], "w") as file:
        json.dump(answer, file)
