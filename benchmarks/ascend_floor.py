"""What MindSpore itself takes to launch: a graph of as many norms as a token has kernels, and one with its arguments.

Run by ascend_host.py on the simulated card with operators that do nothing. Prints a table's rows.
"""

import statistics
import time

import mindspore as ms
from mindspore import nn, ops

CALLS, WARM_UP = 100, 5
GRAPHS = ((430, 1), (430, 300), (10, 300))  # kernels, arguments besides the first


class Chain(nn.Cell):
    """Norms one behind the other, by turns with each of the arguments as weight."""

    def __init__(self, kernels):
        super().__init__()
        self.kernels = kernels

    @ms.jit
    def construct(self, x, *weights):
        for place in range(self.kernels):
            x = ops.rms_norm(x, weights[place % len(weights)], 1e-5)[0]
        return x


def milliseconds(kernels, arguments):
    """The median of a call and the read of its result."""
    chain, x = Chain(kernels), ops.ones((1, 64), ms.bfloat16)
    weights, times = [ops.ones((64,), ms.bfloat16) for _ in range(arguments)], []
    for _ in range(WARM_UP + CALLS):
        begin = time.perf_counter()
        chain(x, *weights).asnumpy()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[WARM_UP:])


def main():
    ms.set_device("Ascend")
    for kernels, arguments in GRAPHS:
        print(f"| a graph of {kernels} kernels and {arguments + 1} arguments | {milliseconds(kernels, arguments):.1f} |")


if __name__ == "__main__":
    main()
