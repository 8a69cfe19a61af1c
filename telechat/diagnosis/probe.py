"""What is tried on a device, each in a process of its own: python -m telechat.diagnosis.probe NAME ARGUMENTS RESULT.

ARGUMENTS is JSON, RESULT the file that the answer is written to as JSON. Processes of their own, because MindSpore's
kernels for inference stay on once they are, and because what crashes is to take nothing else with it.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from telechat.diagnosis.error_text import last_error
from telechat.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def tiny_config(head_dim=128, **fields):
    """A model of two layers and four heads of the sizes that the published ones have."""
    from telechat.config import TeleChatConfig

    sizes = dict(vocab_size=1024, hidden_size=4 * head_dim, n_layer=2, n_head=4, ffn_hidden_size=256,
                 initializer_range=0.05)
    return TeleChatConfig(**{**sizes, **fields})


def machine():
    """The device in words, and how many there are."""
    import mindspore as ms

    from telechat.nn.device import on_cpu
    from telechat.nn.kernels import device_name

    return {"device": device_name(), "cards": 1 if on_cpu() else ms.hal.device_count()}


def sum_over_processes():
    """What an all-reduce gives where process r gives r + 1: [float32, bfloat16], and how many processes there are."""
    import mindspore as ms
    from mindspore import Tensor

    from telechat.parallel.collectives import all_reduce
    from telechat.parallel.mesh import Mesh
    from telechat.parallel.parallel_config import ParallelConfig

    world = Mesh.create(ParallelConfig()).world
    sums = [all_reduce(Tensor([world.rank + 1.0], dtype), world).astype(ms.float32).asnumpy().tolist()[0]
            for dtype in (ms.float32, ms.bfloat16)]
    return {"sums": sums, "processes": world.size}


def placement(dtype):
    """Of every kind of tensor that graphs write to, how many are in the device's memory and how many are not."""
    from telechat.model import TeleChat
    from telechat.nn.device import is_on_device
    from telechat.training.train_config import TrainConfig
    from telechat.training.trainer import Trainer

    trainer = Trainer(TeleChat(tiny_config(), dtype), TrainConfig(dtype=dtype))
    optimizer = trainer.optimizer
    kinds = {"weights": list(trainer.stage.parameters.values()),
             "their data": [parameter.data for parameter in trainer.stage.parameters.values()]}
    for kind, groups in (("masters", optimizer.masters), ("first moments", optimizer.first),
                         ("second moments", optimizer.second)):
        kinds[kind] = [tensor for group in groups for tensor in group]
    tables = trainer.compute._tables(_ids(1, 64))
    kinds["masks and tables"] = [tensor for tensor in tables if tensor is not None]
    return {kind: [sum(map(is_on_device, tensors)), len(tensors)] for kind, tensors in kinds.items()}


def in_place():
    """Whether AdamW's update of a Parameter's ``data`` is seen by the Parameter and by another graph.

    For a Parameter in the device's memory and one in the host's: by how much each sees it moved; 0 where it is lost.
    """
    import mindspore as ms
    from mindspore import Parameter, Tensor

    from telechat.nn.device import device_parameter, device_tensor, device_zeros
    from telechat.nn.graphs import Update
    from telechat.nn.kernel_choice import choose_kernels
    from telechat.training.update_check import Difference

    kernels = choose_kernels(tiny_config(), ms.float32)
    update, difference = Update(kernels), Difference()
    found = {}
    ones = _numpy().ones((4, 4), "float32")
    for name, parameter in (("device", device_parameter(ones, ms.float32, "device")),
                            ("host", Parameter(Tensor.from_numpy(ones.copy()), name="host"))):
        tensor = parameter.data
        scalars = kernels.adamw_scalars(1, 0.5, (0.9, 0.95), 1e-8, 0.0)
        moments = [device_zeros((4, 4), ms.float32) for _ in range(2)]
        update(Tensor(1.0, ms.float32), *scalars, tensor, *moments, device_tensor(ones))
        in_graph = float(difference(parameter.data, device_zeros((4, 4), ms.float32)).asnumpy()[0])
        found[name] = [round(1 - float(parameter.asnumpy()[0, 0]), 4), round(1 - in_graph, 4)]
    return found


def cache_in_place(dtype, head_dim):
    """The same of keys and values that are written into a cache: which part of them the cache and another graph then have."""
    import mindspore as ms
    from mindspore import Tensor

    from telechat.diagnosis.checks import Total, Written
    from telechat.model import as_dtype
    from telechat.nn.device import device_tensor, device_zeros
    from telechat.nn.inference import use_inference_kernels
    from telechat.nn.kernel_choice import choose_kernels

    use_inference_kernels()
    np, heads, tokens, size = _numpy(), 4, 8, 16
    kernels = choose_kernels(tiny_config(head_dim), as_dtype(dtype))
    write, total, found = Written(kernels), Total(), {}
    index = kernels.cache_index(np.arange(size, size + tokens)[None], heads, size)
    new = kernels.split_heads(device_tensor(np.ones((tokens, heads * head_dim), "float32"), kernels.dtype), tokens, head_dim)
    shape = kernels.cache_shape(2, size, heads, head_dim)
    for name in ("device", "host"):
        caches = [device_zeros(shape, kernels.dtype) if name == "device" else
                  Tensor(np.zeros(shape, "float32"), kernels.dtype) for _ in range(2)]
        write(*map(kernels.cache_view, caches), new, new, index)
        in_graph = [float(total(cache).asnumpy()) for cache in caches]
        outside = [float(cache.astype(ms.float32).asnumpy().sum()) for cache in caches]
        found[name] = [round(min(part) / new.size, 4) for part in (outside, in_graph)]
    return {"kernels": kernels.describe(), **found}


def kernels(dtype, head_dim, length):
    """[name, error, error of the gradients, allowed] of each kernel, inside a compiled graph."""
    from telechat.model import as_dtype
    from telechat.nn.kernel_choice import choose_kernels
    from telechat.nn.self_test import check_kernels

    chosen = choose_kernels(tiny_config(head_dim, attention_dropout=0.1), as_dtype(dtype))
    return [list(result) for result in check_kernels(chosen, head_dim, length)]


def trace(dtype, length, steps=3, parallel=None, batch_size=2):
    """Some steps of a tiny model on one batch, spread over the processes there are: each one's [loss, norm]; and of the
    first one's gradient of each tensor that this process has [its length, components along some directions]."""
    from telechat.parallel.mesh import Mesh
    from telechat.parallel.parallel_config import ParallelConfig
    from telechat.parallel.stage import build_stage, read_random
    from telechat.training.train_config import TrainConfig
    from telechat.training.trainer import Trainer

    config, parallel = tiny_config(num_key_value_heads=4), ParallelConfig(**(parallel or {}))
    mesh = Mesh.create(parallel)
    train = TrainConfig(learning_rate=1e-3, lr_schedule="constant", total_steps=steps, dtype=dtype)
    trainer = Trainer(build_stage(config, dtype, mesh, parallel, read_random(config, 0)), train, parallel, mesh)
    ids, results, gradients = _ids(batch_size, length + 1), [], []
    for _ in range(steps):
        results.append(trainer.train_step(ids, ids))
        # The first moments are the first step's gradients then, times 1 − β1.
        gradients = gradients or [_components(tensor) for group in trainer.optimizer.first for tensor in group]
    return {"steps": [[result.loss, result.grad_norm] for result in results], "gradients": gradients}


def _components(tensor, directions=4):
    """The length of a tensor, and how far it reaches along some directions drawn at random, each element's ±1."""
    import mindspore as ms

    values = tensor.astype(ms.float32).asnumpy().ravel().astype("float64")
    random = _numpy().random.default_rng(values.size)
    return [float((values ** 2).sum() ** 0.5),
            *(float(values @ random.choice((-1.0, 1.0), values.size)) for _ in range(directions))]


def generation(dtype, head_dim, prompts=(8, 40, 8)):
    """Answers through the cache to prompts of these lengths in turn, against the model without one.

    For each how far a chosen token's logit lies below the best one, as a share of the largest, and the seconds that it
    took: those of a length that was there before compile nothing; and the kernels.
    """
    import time

    from telechat.nn.inference import use_inference_kernels

    use_inference_kernels()
    from telechat.generation.generator import Generator
    from telechat.generation.sampling import SamplingParams
    from telechat.model import TeleChat

    np = _numpy()
    model = TeleChat(tiny_config(head_dim), dtype)
    generator, short, seconds = Generator(model, max_length=64), [], []
    for length in prompts:
        prompt = _ids(1, length)[0].tolist()
        start = time.perf_counter()
        answer = generator.generate([prompt], SamplingParams(8))[0]
        seconds.append(time.perf_counter() - start)
        logits = model(np.array([prompt + answer])).asnumpy()[0, length - 1:-1]
        short.append(float(max(row.max() - row[token] for row, token in zip(logits, answer)) / np.abs(logits).max()))
    return {"kernels": model.kernels.describe(), "short": short, "seconds": seconds}


def times(dtype, length):
    """Seconds of a step, of its update and of its head with the loss (each waited for), and the peak of the device's
    memory in bytes, of all and of an update."""
    import time

    import mindspore as ms

    from telechat.model import TeleChat
    from telechat.training.train_config import TrainConfig
    from telechat.training.trainer import Trainer

    trainer = Trainer(TeleChat(tiny_config(), dtype), TrainConfig(total_steps=9, dtype=dtype))
    ids, spent, peaks = _ids(1, length + 1), {"update": 0.0, "head": 0.0}, {"before": 0}

    def timed(name, call):
        def run(*arguments):
            ms.runtime.synchronize()
            peaks["before"] = max(peaks["before"], ms.runtime.max_memory_allocated())
            ms.runtime.reset_max_memory_allocated()
            start = time.perf_counter()
            result = call(*arguments)
            ms.runtime.synchronize()
            spent[name] = time.perf_counter() - start
            peaks[name] = ms.runtime.max_memory_allocated()
            return result
        return run
    trainer.optimizer.update = timed("update", trainer.optimizer.update)
    trainer.compute.loss_and_gradient = timed("head", trainer.compute.loss_and_gradient)
    for _ in range(4):  # the first ones compile and compare
        start = time.perf_counter()
        trainer.train_step(ids, ids)
        whole = time.perf_counter() - start
    return {"step": whole, **spent, "peak": max(peaks.values()), "update_peak": peaks["update"]}


def _ids(rows, length):
    return _numpy().random.default_rng(0).integers(4, 1024, (rows, length))


def _numpy():
    import numpy

    return numpy


def run_probe(name, *arguments, processes=1, on_host=False, timeout=1800, **variables):
    """What a function of this file returns, run in ``processes`` of its own.

    Args:
        on_host (bool): on the CPU, whatever device there is.
        variables (str): of the environment.

    Raises:
        InputError: it failed; the message has its last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder, "result.json")
        command = [sys.executable, "-m", "telechat.diagnosis.probe", name, json.dumps([on_host, *arguments]), str(result)]
        if processes > 1:
            command = [sys.executable, str(ROOT / "tools" / "launch.py"), "-n", str(processes), "--log_dir", folder,
                       str(pathlib.Path(__file__)), *command[3:]]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                       **variables}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
        except subprocess.TimeoutExpired:
            raise InputError(f"{name} had no result after {timeout} s") from None
        if done.returncode or not result.exists():
            raise InputError(f"{name} failed with status {done.returncode}: {last_error(done.stdout + done.stderr)}")
        return json.loads(result.read_text())


def main(argv):
    name, arguments, result = argv
    on_host, *arguments = json.loads(arguments)
    if on_host:
        import mindspore as ms

        ms.set_device("CPU")
    answer = globals()[name](*arguments)
    if int(os.environ.get("RANK_ID", 0)) == 0:
        pathlib.Path(result).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
