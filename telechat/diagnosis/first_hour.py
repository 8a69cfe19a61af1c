"""The first hour with a real card: what is tried there, in order, and compared with the host's portable kernels."""

import math
import shutil
import subprocess

from telechat.diagnosis.probe import run_probe
from telechat.errors import InputError

LOSS, NORM = 0.02, 0.1  # how far bfloat16's may be from the host's float32
EXACT = 1e-3  # and float32's
GRADIENTS = 0.2  # how far a weight's gradient, along any direction, of its length
CHOICE = 0.05  # how far a chosen token's logit may lie below the best one
HEADS = (128, 160)


class FirstHour:
    """Runs the steps; each yields lines and notes what is wrong in ``problems``.

    Args:
        length (int): tokens of the long sequences.
        cards (int): how many there are.
    """

    def __init__(self, length=2048, cards=1):
        self.length, self.cards = length, cards
        self.problems = []
        self._on_host = {}

    def run(self):
        """Yield the report, line by line."""
        steps = (self.machine, self.placement, self.in_place, self.kernels, self.training, self.generation, self.buckets,
                 self.several_cards, self.times)
        for number, step in enumerate(steps, 1):
            yield f"{number}. {step.__doc__.rstrip('.')}"
            try:
                for line in step():
                    yield f"   {line}"
            except InputError as error:
                self.problems.append(f"step {number}: {error}")
                yield f"   FAILED: {error}"

    def _judge(self, good, line, problem):
        if not good:
            self.problems.append(problem)
        return f"{line} {'good' if good else 'WRONG'}"

    def machine(self):
        """The machine, and a sum over two cards."""
        if shutil.which("npu-smi"):
            done = subprocess.run(["npu-smi", "info"], capture_output=True, text=True, check=False)
            yield from done.stdout.splitlines()
        else:
            yield "npu-smi is not in PATH"
        if self.cards < 2:
            yield "one card: no sum over two"
            return
        found = run_probe("sum_over_processes", processes=2)
        yield self._judge(found == {"sums": [3.0, 3.0], "processes": 2}, f"all-reduce of 1 and 2, float32 and bfloat16: "
                          f"{found['sums']}", f"an all-reduce of 1 and 2 gave {found['sums']}")

    def placement(self):
        """Where the tensors are that graphs write to."""
        for dtype in ("bfloat16", "float32"):
            for kind, (there, count) in run_probe("placement", dtype).items():
                yield self._judge(there == count, f"{dtype:9} {kind:16} {there} of {count} in the device's memory",
                                  f"in {dtype}, {count - there} of {count} {kind} are in host memory, where updates are lost")

    def in_place(self):
        """Updates in place, read back by the tensor and by another graph."""
        found = run_probe("in_place")
        good = all(abs(step - 0.5) < 1e-3 for step in found["device"])
        yield self._judge(good, f"a weight on the device moved by {found['device']} of 0.5",
                          f"AdamW moved a weight on the device by {found['device']}, should be 0.5")
        yield f"a weight left on the host moved by {found['host']} (0: lost, as known of MindSpore 2.10)"
        found = run_probe("cache_in_place", "bfloat16", HEADS[0])
        yield self._judge(found["device"] == [1, 1], f"of keys written to a cache on the device arrived {found['device']}",
                          f"of keys and values written to a cache on the device arrived {found['device']}, should be all")
        yield f"of keys written to a cache left on the host arrived {found['host']} (0: lost)"

    def kernels(self):
        """The fused operations inside graphs against float64: error of results, of gradients, and what is allowed."""
        for dim in HEADS:
            for name, error, gradient_error, allowed in run_probe("kernels", "bfloat16", dim, self.length):
                yield self._judge(
                    error <= allowed and gradient_error <= allowed,
                    f"heads of {dim}, {self.length} tokens: {name:14} {error:.1e} {gradient_error:.1e} of {allowed:.0e}",
                    f"{name} with heads of {dim} is off by {max(error, gradient_error):.1e}, allowed is {allowed:.0e}")

    def training(self):
        """Three steps of training, whose updates must arrive, against float32 on the host."""
        for dtype, loss, norm in (("bfloat16", LOSS, NORM), ("float32", EXACT, EXACT)):
            found = run_probe("trace", dtype, self.length)
            yield self._compare(f"{dtype}, {self.length} tokens", found, loss, norm)
            apart = [max(abs(a - b) / theirs[0] for a, b in zip(ours, theirs))
                     for ours, theirs in zip(found["gradients"], self._host(self.length)["gradients"], strict=True)]
            allowed = GRADIENTS if dtype == "bfloat16" else EXACT
            yield self._judge(max(apart) < allowed, f"{dtype}: {len(apart)} weights' first gradients within {max(apart):.1e} of "
                              f"the host's, of {allowed:.0e}", f"{dtype}: gradients differ from the host's by {max(apart):.1e} of "
                              f"their length, allowed is {allowed:.0e}")

    def generation(self):
        """Answers through the cache against the model without one."""
        for dim in HEADS:
            found = run_probe("generation", "bfloat16", dim, [8])
            yield self._judge(found["short"][0] < CHOICE, f"heads of {dim}: at most {found['short'][0]:.1e} short of the best; "
                              f"{found['kernels']}", f"answers through the cache differ with heads of {dim}")

    def buckets(self):
        """Prompts of two lengths in turn."""
        found = run_probe("generation", "bfloat16", HEADS[0])
        short, seconds = found["short"], ", ".join(f"{time:.1f}" for time in found["seconds"])
        yield f"answers took {seconds} s: the first two compile, the third has the first one's length and is to be quick"
        yield self._judge(max(short) < CHOICE, f"at most {max(short):.1e} short of the best",
                          "answers to prompts of two lengths in turn differ from the model without a cache")

    def several_cards(self):
        """Several cards: tensor, data and sequence parallel with a sharded optimizer, then pipeline stages."""
        if self.cards < 2:
            yield "one card: left out"
            return
        tensor = 4 if self.cards >= 8 else 2 if self.cards >= 4 else 1
        data = min(self.cards // tensor, 2)
        meshes = [{"tensor": tensor, "data": data, "sequence_parallel": tensor > 1, "shard_optimizer": True},
                  {"tensor": tensor, "pipeline": 2}]
        for mesh in meshes:
            count = math.prod(value for name, value in mesh.items() if name in ("tensor", "data", "pipeline"))
            found = run_probe("trace", "bfloat16", 256, 3, mesh, processes=count)
            words = ", ".join(name.replace("_", " ") + ("" if value is True else f" {value}")
                              for name, value in mesh.items() if value is True or value > 1)
            yield self._compare(f"{count} cards, {words}", found, LOSS, NORM, 256)

    def times(self):
        """Time and memory of a step; its copies to the card are shown by tools/train.py --profile 5."""
        for way, blocking in (("the thread that calls", "1"), ("MindSpore's threads", "0")):
            found = run_probe("times", "bfloat16", self.length, MS_DEV_HOST_BLOCKING_RUN=blocking)
            yield (f"launched by {way}: a step takes {found['step']:.3f} s, the update {found['update'] / found['step']:.0%} of it, "
                   f"head and loss {found['head'] / found['step']:.0%}")
        yield f"peak memory {found['peak'] / 1e9:.2f} GB, during the update {found['update_peak'] / 1e9:.2f} GB"

    def _host(self, length):
        """The same trace in float32 on the host, by portable kernels."""
        if length not in self._on_host:
            self._on_host[length] = run_probe("trace", "float32", length, on_host=True)
        return self._on_host[length]

    def _compare(self, what, found, loss, norm, length=None):
        """A trace with the host's: losses within ``loss``, the first norm within ``norm``."""
        found, wanted = found["steps"], self._host(length or self.length)["steps"]
        apart = max(abs(ours[0] / theirs[0] - 1) for ours, theirs in zip(found, wanted))
        norms = abs(found[0][1] / wanted[0][1] - 1)
        return self._judge(apart < loss and norms < norm, f"{what}: losses within {apart:.1e} of the host's, of {loss:.0e}, the "
                           f"first gradient's norm within {norms:.1e}, of {norm:.0e}", f"{what}: training differs from the host's by {apart:.1e}, "
                           f"its first gradient's norm by {norms:.1e}")
