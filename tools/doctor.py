"""Say what this machine has, which kernels a model will use on it, and whether they compute right.

    python tools/doctor.py [--dtype bfloat16]
    python tools/doctor.py --first-hour        all that is worth knowing of a new card, in a report to send in
"""

import importlib.metadata
import itertools
import os
import pathlib
import platform
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from telechat.cli import ArgumentParser, path_argument, run  # noqa: E402
from telechat.diagnosis.error_text import summary  # noqa: E402
from telechat.errors import InputError  # noqa: E402
from telechat.version import check_mindspore, code_version  # noqa: E402

HEADS = (128, 160)  # a card's operations choose among kernels by the heads' size: those of 7B and 12B
PACKAGES = ("mindspore", "numpy", "safetensors", "sentencepiece", "tokenizers")


def main(argv=None):
    parser = ArgumentParser(description="Versions, device, kernels, a self-test of their numbers, and a verdict.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="default: bfloat16, on a CPU float32")
    parser.add_argument("--kernels", choices=("ascend", "cpu", "portable"), help="default: what the device has")
    parser.add_argument("--first-hour", action="store_true",
                        help="try more, in some minutes, several cards too, and write it to --report")
    parser.add_argument("--report", type=path_argument, default="first_hour.txt", help="where --first-hour writes")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the long sequences on a card")
    arguments = parser.parse_args(argv)
    if arguments.first_hour:
        return first_hour(arguments)

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
    from telechat.diagnosis.probe import tiny_config
    from telechat.model import TeleChat, as_dtype
    from telechat.nn.kernel_choice import choose_kernels
    from telechat.nn.kernels import device_name, on_cpu

    print(f"device      {device_name()}")
    if not on_cpu():
        print(f"CANN        {cann_version()}")
    dtype = arguments.dtype or ("float32" if on_cpu() else "bfloat16")
    config = TeleChatConfig(vocab_size=256, hidden_size=64, n_layer=2, n_head=4, ffn_hidden_size=96, attention_dropout=0.1,
                            hidden_dropout=0.1)
    kernels = choose_kernels(config, as_dtype(dtype), arguments.kernels)
    print(f"kernels     {kernels.describe()}; weights {dtype}, computing in {str(kernels.dtype).lower()}")
    kernels.require_device()
    print("self-test   largest error of results and gradients, of their largest value")
    try_kernels(kernels, arguments.length, problems)
    try_dropout_and_sums(kernels, problems)
    if on_cpu():
        model = TeleChat(config, dtype, kernels=arguments.kernels)
        try_training(model, dtype, 32, problems)
        try_generation(model, dtype, problems)
    else:
        for dim in HEADS:
            try_training(TeleChat(tiny_config(dim), dtype, kernels=arguments.kernels), dtype, arguments.length, problems)
        try_generation_alone(dtype, problems)
    return verdict(problems)


def first_hour(arguments):
    """`FirstHour`, printed and written to a file as it comes."""
    from telechat.diagnosis.first_hour import FirstHour
    from telechat.diagnosis.probe import run_probe

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    variables = " ".join(f"{name}={value}" for name, value in sorted(os.environ.items())
                         if name.startswith(("MS_", "HCCL_", "ASCEND_", "GLOG_", "OMP_")))
    machine = run_probe("machine")
    steps = FirstHour(arguments.length, machine["cards"])
    try:
        with open(arguments.report, "w", encoding="utf-8") as file:
            head = (f"telechat's first hour on {machine['device']}; CANN {cann_version()}; {versions}",
                    f"python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores; "
                    f"telechat {code_version()[:12]}",
                    f"environment: {variables or 'nothing set'}",
                    "tiny models of two layers; errors are relative, and beside \"of\" stands what is allowed")
            for line in itertools.chain(head, steps.run()):
                print(line, flush=True)
                print(line, file=file, flush=True)
            print(f"report      {arguments.report}")
            return verdict(steps.problems, file)
    except OSError as error:
        raise InputError(f"--report {arguments.report} cannot be written: {error.strerror}") from None


def try_kernels(kernels, length, problems):
    """Each kernel against its formula; where the device fails instead, what it says."""
    import mindspore as ms

    from telechat.nn.kernels import on_cpu
    from telechat.nn.self_test import check_kernels

    # Only flash attention does without scores of length × length.
    length = 16 if on_cpu() else length if kernels.flash else min(length, 256)
    for dim in (16,) if on_cpu() else HEADS:
        heads, last = "" if on_cpu() else f"heads of {dim} ", "none"
        try:
            for name, error, gradient_error, allowed in check_kernels(kernels, dim, length):
                good, last = error <= allowed and gradient_error <= allowed, name
                print(f"  {heads}{name:17} {error:.1e} {gradient_error:.1e} {'good' if good else 'WRONG'}", flush=True)
                if not good:
                    problems.append(f"{heads}{name} is off by {max(error, gradient_error):.1e}, allowed is {allowed:.0e}")
        except (InputError, RuntimeError) as failure:
            print(f"  {heads}{'kernels':17} WRONG", flush=True)
            problems.append(f"the kernel after {last}, {heads.strip() or 'on this device'}, fails: {summary(str(failure))}")
            if (ms.get_context("jit_config") or {}).get("infer_boost") == "on":
                problems[-1] = ("infer_boost is on in this process, whose kernels have no gradients: leave it off where "
                                f"models are trained; {problems[-1]}")


def try_dropout_and_sums(kernels, problems):
    """Where dropout is drawn and how it is scaled; whether sums of gradients keep small parts."""
    from telechat.diagnosis.checks import dropout_problems, sum_problems

    for what, find in (("dropout masks", dropout_problems), ("sums of gradients", sum_problems)):
        try:
            found = find(kernels)
        except RuntimeError as failure:
            found = [f"{what} fail: {summary(str(failure))}"]
        problems += found
        print(f"  {what:17} {'WRONG' if found else 'good'}", flush=True)


def try_training(model, dtype, length, problems):
    """A tiny model learns one batch in a few steps; where its weights are, and whether updates arrive, is checked."""
    import numpy as np

    from telechat.training.train_config import TrainConfig
    from telechat.training.trainer import Trainer
    from telechat.training.update_check import UpdateLost

    ids = np.random.default_rng(0).integers(4, 256, (2, length + 1))
    name = f"training, heads of {model.config.head_dim}, {length} tokens"
    # Adam moves every weight by the rate: the wider the model, the less each may move.
    rate = 0.64 / model.config.hidden_size
    try:
        trainer = Trainer(model, TrainConfig(learning_rate=rate, lr_schedule="constant", total_steps=5, dtype=dtype))
        losses = [trainer.train_step(ids, ids).loss for _ in range(5)]
    except (InputError, UpdateLost, RuntimeError) as error:
        print(f"  {name} WRONG", flush=True)
        problems.append(f"training with heads of {model.config.head_dim}: {summary(str(error))}")
        return
    good = np.isfinite(losses).all() and losses[-1] < losses[0]
    print(f"  {name}: loss {losses[0]:.3f} to {losses[-1]:.3f} in 5 steps {'good' if good else 'WRONG'}", flush=True)
    if not good:
        problems.append(f"the loss of five steps on one batch, with heads of {model.config.head_dim}, went from "
                        f"{losses[0]:.3f} to {losses[-1]:.3f}")


def try_generation(model, dtype, problems):
    """A tiny model answers through its cache what it computes without."""
    import numpy as np

    from telechat.generation.generator import Generator
    from telechat.generation.sampling import SamplingParams

    prompt = np.random.default_rng(0).integers(4, 256, 8).tolist()
    answer = Generator(model, max_length=32).generate([prompt], SamplingParams(8))[0]
    logits = model(np.array([prompt + answer])).asnumpy()[0, len(prompt) - 1:-1]
    # What was chosen may differ from the best by the dtype's rounding, not by more.
    short = max(row.max() - row[token] for row, token in zip(logits, answer)) / np.abs(logits).max()
    good = short < (1e-4 if dtype == "float32" else 0.05)
    print(f"  generation {len(answer)} tokens through the cache {'good' if good else 'WRONG'}")
    if not good:
        problems.append("generation through the cache differs from the model without it")


def try_generation_alone(dtype, problems):
    """The same on a card, in a process of its own: MindSpore's kernels for decoding stay on once they are."""
    from telechat.diagnosis.probe import run_probe, tiny_config
    from telechat.model import as_dtype
    from telechat.nn.paged_attention import obstacle

    for dim in HEADS:
        try:
            found = run_probe("generation", dtype, dim)
        except InputError as error:
            print(f"  generation, heads of {dim} WRONG", flush=True)
            problems.append(str(error))
            continue
        paged = dtype == "float32" or "PagedAttention" in found["kernels"]
        good = paged and max(found["short"]) < (1e-4 if dtype == "float32" else 0.05)
        print(f"  generation, heads of {dim}, two lengths of prompts {'good' if good else 'WRONG'}", flush=True)
        if not paged:
            problems.append(f"decoding with heads of {dim} does not use PagedAttention: "
                            f"{obstacle(tiny_config(dim), as_dtype(dtype)) or found['kernels']}")
        elif not good:
            problems.append(f"generation through the cache with heads of {dim} differs from the model without it")


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


def verdict(problems, file=None):
    """Print it, and write it to a file if there is one; the exit status."""
    lines = ["verdict     all that was tried is right: this machine can train and generate"]
    if problems:
        lines = ["verdict     do not train here yet:", *(f"  - {problem}" for problem in problems)]
    for line in lines:
        print(line)
        if file is not None:
            print(line, file=file)
    return 1 if problems else 0


if __name__ == "__main__":
    run(main)
