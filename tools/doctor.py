"""Say what this machine has, which kernels a model will use on it, and whether they compute right.

    python tools/doctor.py [--dtype bfloat16]
"""

import importlib.metadata
import os
import pathlib
import platform
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from telechat.cli import ArgumentParser, run  # noqa: E402
from telechat.errors import InputError  # noqa: E402
from telechat.version import check_mindspore  # noqa: E402

PACKAGES = ("mindspore", "numpy", "safetensors", "sentencepiece", "tokenizers")


def main(argv=None):
    parser = ArgumentParser(description="Versions, device, kernels, a self-test of their numbers, and a verdict.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="default: bfloat16, on a CPU float32")
    parser.add_argument("--kernels", choices=("ascend", "cpu", "portable"), help="default: what the device has")
    arguments = parser.parse_args(argv)

    problems = []
    print(f"python      {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in PACKAGES:
        try:
            print(f"{name:11} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed")
    try:
        check_mindspore()
    except InputError as error:
        problems.append(str(error))
    if problems:
        return verdict(problems)

    from telechat.config import TeleChatConfig
    from telechat.model import TeleChat, as_dtype
    from telechat.nn.kernels import choose_kernels, device_name, on_cpu
    from telechat.nn.self_test import check_kernels

    print(f"device      {device_name()}")
    if not on_cpu():
        print(f"CANN        {cann_version()}")
    dtype = arguments.dtype or ("float32" if on_cpu() else "bfloat16")
    config = TeleChatConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4, ffn_hidden_size=96)
    kernels = choose_kernels(config, as_dtype(dtype), arguments.kernels)
    print(f"kernels     {kernels.describe()}; weights {dtype}, computing in {str(kernels.dtype).lower()}")
    kernels.require_device()
    print("self-test   largest error of results and gradients, of their largest value")
    for name, error, gradient_error, allowed in check_kernels(kernels):
        good = error <= allowed and gradient_error <= allowed
        print(f"  {name:10} {error:.1e} {gradient_error:.1e} {'good' if good else 'WRONG'}", flush=True)
        if not good:
            problems.append(f"{name} is off by {max(error, gradient_error):.1e}, allowed is {allowed:.0e}")
    try_model(TeleChat(config, dtype, kernels=arguments.kernels), dtype, problems)
    return verdict(problems)


def try_model(model, dtype, problems):
    """A tiny model learns one batch in a few steps, and answers through its cache what it computes without."""
    import numpy as np

    from telechat.generation.generator import Generator
    from telechat.generation.sampling import SamplingParams
    from telechat.training.train_config import TrainConfig
    from telechat.training.trainer import Trainer

    ids = np.random.default_rng(0).integers(4, 256, (2, 33))
    trainer = Trainer(model, TrainConfig(learning_rate=1e-2, lr_schedule="constant", total_steps=5, dtype=dtype))
    losses = [trainer.train_step(ids, ids).loss for _ in range(5)]
    good = np.isfinite(losses).all() and losses[-1] < losses[0]
    print(f"  training   loss {losses[0]:.3f} to {losses[-1]:.3f} in 5 steps {'good' if good else 'WRONG'}", flush=True)
    if not good:
        problems.append(f"the loss of five steps on one batch went from {losses[0]:.3f} to {losses[-1]:.3f}")
    prompt = ids[0, :8].tolist()
    answer = Generator(model, max_length=32).generate([prompt], SamplingParams(8))[0]
    logits = model(np.array([prompt + answer])).asnumpy()[0, len(prompt) - 1:-1]
    # What was chosen may differ from the best by the dtype's rounding, not by more.
    short = max(row.max() - row[token] for row, token in zip(logits, answer)) / np.abs(logits).max()
    good = short < (1e-4 if dtype == "float32" else 0.05)
    print(f"  generation {len(answer)} tokens through the cache {'good' if good else 'WRONG'}")
    if not good:
        problems.append("generation through the cache differs from the model without it")


def cann_version():
    """The version of the installed CANN toolkit, as its files say it."""
    root = pathlib.Path(os.environ.get("ASCEND_HOME_PATH", "/usr/local/Ascend/ascend-toolkit/latest"))
    for name in ("version.cfg", "compiler/version.info"):
        file = root / name
        if file.is_file():
            lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if "ersion" in line]
            if lines:
                return lines[0]
    return f"not found in {root}; set ASCEND_HOME_PATH, or source CANN's set_env.sh"


def verdict(problems):
    """Print it; the exit status."""
    if problems:
        print("verdict     do not train here yet:")
        for problem in problems:
            print(f"  - {problem}")
        return 1
    print("verdict     all that was tried is right: this machine can train and generate")
    return 0


if __name__ == "__main__":
    run(main)
