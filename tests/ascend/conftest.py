"""Small models in the three published styles, on Ascend kernels in bfloat16, and tensors to export them with."""

import json
import subprocess
import sys

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from telechat import TeleChat
from telechat.nn.block_graphs import Attention, FeedForward
from tests.conftest import ROOT
from tests.test_model import small_config

SIZES = dict(hidden_size=64, n_head=4, num_key_value_heads=2, vocab_size=96, ffn_hidden_size=48)
STYLES = {
    "7b": dict(tie_word_embeddings=True, rotary_ntk_context=4096, hidden_dropout=0.1, attention_dropout=0.1),
    "12b": dict(),
    "52b": dict(use_bias=False, rotary_float16=False, rotary_ntk_scales_theta=True, rotary_ntk_context=4096,
                input_mult=2.0, output_mult=0.5),
}


def bfloat16(*shape):
    return Tensor(np.ones(shape, np.float32)).astype(ms.bfloat16)


def float32(*shape):
    return Tensor(np.ones(shape, np.float32))


class Method(nn.Cell):
    """A compiled method that is not construct."""

    def __init__(self, cell, name):
        super().__init__()
        self.cell = cell
        self.method = getattr(cell, name)

    def construct(self, *arguments):
        return self.method(*arguments)


class Parts:
    """A model of one style, and the arguments of its graphs for ``batch`` sequences of ``length`` tokens."""

    def __init__(self, batch=2, length=16, **fields):
        self.config = small_config(**{**SIZES, **fields})
        self.model = TeleChat(self.config, "bfloat16", kernels="ascend")
        self.model.kernels.paged = self.config.position_embedding != "alibi"
        self.kernels = self.model.kernels
        self.functions = self.model.transformer.h[0].functions
        self.weights = [None if weight is None else weight.data for weight in self.model.transformer.h[0].weights()]
        self.batch, self.length, self.rows = batch, length, batch * length
        self.tables = self.model.tables(length)
        bits = Tensor(np.full((batch, 4, length, length // 8), 255, np.uint8))
        dropped = self.config.attention_dropout > 0
        self.drops = (bits, float32(self.rows, 64), float32(self.rows, 64)) \
            if dropped else (None, None, None)

    def attention(self, visible=None):
        """Export arguments of the block's first half: its forward and its backward pass."""
        tables = self.tables if visible is None else (*self.tables[:2], *visible)
        last = (*tables, *self.drops[:2], *self.weights[:5])
        x, half = bfloat16(self.rows, 64), Attention(self.functions)
        heads = [bfloat16(self.batch, self.length, heads, 16) for heads in (4, 2, 2)]
        # The gradient, x, queries, keys, values, no probabilities, attention's result.
        return (Method(half, "forward"), x, *last), (Method(half, "backward"), x, x, *heads, None, x, *last)

    def feed_forward(self, recompute=False):
        """The same of its second half, for all rows at once."""
        last = (self.drops[2], *self.weights[5:])
        gate_up = (None, None) if recompute else (bfloat16(self.rows, 48), bfloat16(self.rows, 48))
        middle, half = bfloat16(self.rows, 64), FeedForward(self.functions)
        return (Method(half, "forward_rows"), middle, *last), (Method(half, "backward_rows"), middle, middle, *gate_up, *last)


@pytest.fixture(scope="package", params=STYLES)
def parts(request):
    """`Parts` of each style."""
    return Parts(**STYLES[request.param])


@pytest.fixture(scope="session")
def card(tmp_path_factory):
    """card(function, *arguments, **settings): what a function of on_card.py, or FILE.FUNCTION, returns on the simulated card.

    settings: environment variables, such as SIM_LOG. The test is skipped where there is no simulated card.
    """
    from simulator.environment import environment, unavailable

    if unavailable():
        pytest.skip(unavailable())

    def run(function, *arguments, timeout=900, **settings):
        folder = tmp_path_factory.mktemp("on_card")
        (folder / "arguments.json").write_text(json.dumps(arguments))
        command = [sys.executable, "-m", "tests.ascend.on_card", function, str(folder / "arguments.json"),
                   str(folder / "result.json")]
        done = subprocess.run(command, env=environment(**settings), cwd=ROOT, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((folder / "result.json").read_text())
    return run
