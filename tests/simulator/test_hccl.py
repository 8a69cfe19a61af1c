"""HCCL between processes: what each rank gets, against numpy; disagreements name both sides.

What each call does and takes: CANN 8.1's hccl.h and its documentation of HCCL.
"""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from simulator.environment import unavailable

if unavailable():
    pytest.skip(unavailable(), allow_module_level=True)

from tests.conftest import ROOT  # noqa: E402
from tests.simulator.run_hccl import TYPES, Counts, Items, Out  # noqa: E402

SUM, PROD, MAX, MIN = range(4)
REDUCTIONS = {SUM: np.sum, PROD: np.prod, MAX: np.max, MIN: np.min}
SIZE = 3


def run(folder, steps, size=SIZE, **variables):
    """The answers of all ranks to the steps, a list a rank."""
    folder.mkdir(exist_ok=True)
    (folder / "job").write_bytes(pickle.dumps({"identifier": f"test-{os.getpid()}-{id(steps)}", "steps": steps}))
    ranks = [subprocess.Popen([sys.executable, "-m", "tests.simulator.run_hccl", str(rank), str(size), folder / "job",
                               folder / f"result{rank}"], cwd=ROOT, env={**os.environ, **variables},
                              stderr=subprocess.DEVNULL) for rank in range(size)]
    assert [rank.wait(timeout=100) for rank in ranks] == [0] * size
    return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(size)]


def bfloat16(array):
    """Rounded to nearest, ties to even, as the 16 bits."""
    bits = np.asarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def values(rank, count, dtype):
    numbers = np.random.default_rng(rank).integers(-4, 5, count) + (0.125 * rank if "float" in dtype else 0)
    return bfloat16(numbers) if dtype == "bfloat16" else numbers.astype(dtype)


def plain(array, dtype):
    return widen(array) if dtype == "bfloat16" else array


def test_collectives(tmp_path):
    """All in one group of three, one after the other."""
    steps, expected = [], []

    def step(name, arguments, results):
        steps.append([(name, arguments(rank)) for rank in range(SIZE)])
        expected.append([results(rank) for rank in range(SIZE)])

    for dtype in ("int8", "int16", "int32", "int64", "float16", "float32", "bfloat16"):
        given = [values(rank, 6, dtype) for rank in range(SIZE)]
        wide = np.stack([plain(x, dtype) for x in given]).astype(np.float64)
        for reduction, function in REDUCTIONS.items():
            if reduction == PROD and dtype in ("int16", "bfloat16"):
                continue
            total = function(wide, axis=0)
            step("HcclAllReduce", lambda rank: (given[rank], Out((6,), dtype), 6, TYPES[dtype], reduction),
                 lambda rank: [(total, dtype)])
        total = wide.sum(0)
        step("HcclReduceScatter", lambda rank: (given[rank], Out((2,), dtype), 2, TYPES[dtype], SUM),
             lambda rank: [(total[2 * rank:2 * rank + 2], dtype)])
        step("HcclReduce", lambda rank: (given[rank], Out((6,), dtype), 6, TYPES[dtype], SUM, 1),
             lambda rank: [(total if rank == 1 else np.zeros(6), dtype)])
        step("HcclAllGather", lambda rank: (given[rank], Out((18,), dtype), 6, TYPES[dtype]),
             lambda rank: [(wide.reshape(-1), dtype)])
        step("HcclAlltoAll", lambda rank: (given[rank], 2, TYPES[dtype], Out((6,), dtype), 2, TYPES[dtype]),
             lambda rank: [(wide[:, 2 * rank:2 * rank + 2].reshape(-1), dtype)])
    for dtype in ("uint8", "float64", "bfloat16"):
        whole = values(5, 6, dtype)
        step("HcclScatter", lambda rank: (whole, Out((2,), dtype), 2, TYPES[dtype], 2),
             lambda rank: [(plain(whole, dtype)[2 * rank:2 * rank + 2], dtype)])
    # Rank r sends r + p numbers to rank p, from places with gaps.
    counts = [[rank + peer for peer in range(SIZE)] for rank in range(SIZE)]
    places = [[5 * peer for peer in range(SIZE)] for _ in range(SIZE)]
    sent = [np.arange(15, dtype=np.float32) + 100 * rank for rank in range(SIZE)]

    def received(rank):
        result = np.zeros(15, np.float32)
        for peer in range(SIZE):
            result[5 * peer:5 * peer + rank + peer] = sent[peer][5 * rank:5 * rank + rank + peer]
        return [(result, "float32")]

    step("HcclAlltoAllV", lambda rank: (sent[rank], Counts(counts[rank]), Counts(places[rank]), TYPES["float32"],
                                        Out((15,), "float32"), Counts(counts[rank]), Counts(places[rank]),
                                        TYPES["float32"]), received)
    big = np.random.default_rng(3).standard_normal(1 << 20).astype(np.float32)  # more than a socket holds
    step("HcclAllReduce", lambda rank: (big, Out(big.shape, "float32"), big.size, TYPES["float32"], SUM),
         lambda rank: [(big.astype(np.float64) * 3, "float32")])
    step("HcclBarrier", lambda rank: (), lambda rank: [])

    answers = run(tmp_path, steps)
    for rank in range(SIZE):
        for (name, _), answer, results in zip([each[rank] for each in steps], answers[rank],
                                              [each[rank] for each in expected]):
            assert isinstance(answer, list), answer
            for array, (wanted, dtype) in zip(answer, results, strict=True):
                rounded = widen(bfloat16(wanted)) if dtype == "bfloat16" else wanted.astype(dtype)
                assert np.array_equal(plain(array, dtype), rounded) or name == "HcclAllReduce" and np.allclose(
                    array, rounded, rtol=1e-6), (name, dtype)
    # The same bits on all ranks, whatever the order of arrival.
    assert all(np.array_equal(answers[0][-2][0], answers[rank][-2][0]) for rank in range(SIZE))


def test_broadcast_and_point_to_point(tmp_path):
    x = np.arange(5, dtype=np.float32)
    steps = [[("HcclBroadcast", (x + rank if rank == 1 else Out((5,), "float32"), 5, TYPES["float32"], 1))
              for rank in range(SIZE)],
             [("HcclSend", (x, 5, TYPES["float32"], 2)), None, ("HcclRecv", (Out((5,), "float32"), 5, TYPES["float32"], 0))],
             [None, ("HcclRecv", (Out((5,), "float32"), 5, TYPES["float32"], 2)), ("HcclSend", (x + 7, 5, TYPES["float32"], 1))]]
    answers = run(tmp_path, steps)
    assert np.array_equal(answers[0][0][0], x + 1) and np.array_equal(answers[2][0][0], x + 1)
    assert np.array_equal(answers[2][1][0], x) and np.array_equal(answers[1][2][0], x + 7)


def test_sends_and_receives_in_a_batch_have_no_order(tmp_path):
    """Each rank sends rank · 10 + peer to each other, all before they receive."""
    def items(rank):
        peers = [peer for peer in range(SIZE) if peer != rank]
        return Items([(0, np.full(4, 10 * rank + peer, np.float32), peer) for peer in peers]
                     + [(1, Out((4,), "float32"), peer) for peer in reversed(peers)])

    twice = Items([(0, np.zeros(4, np.float32), 1)] * 2)
    answers = run(tmp_path, [[("HcclBatchSendRecv", (items(rank),)) for rank in range(SIZE)],
                             [("HcclBatchSendRecv", (twice,)), None, None]])
    for rank in range(SIZE):
        peers = reversed([peer for peer in range(SIZE) if peer != rank])
        assert [array.tolist() for array in answers[rank][0]] == [[10 * peer + rank] * 4 for peer in peers]
    assert "two items of one direction for rank 1" in answers[0][1]


FLOAT = TYPES["float32"]
ZEROS = np.zeros(8, np.float32)


def reduce(count=8, dtype=FLOAT, reduction=SUM):
    return "HcclAllReduce", (ZEROS, Out((8,), "float32"), count, dtype, reduction)


@pytest.mark.parametrize(("calls", "sides"), [
    ((reduce(), reduce(count=6)), ("AllReduce(float32, 8 elements, sum)", "AllReduce(float32, 6 elements, sum)")),
    ((reduce(), reduce(dtype=TYPES["int32"])), ("AllReduce(float32, 8", "AllReduce(int32, 8")),
    ((reduce(), reduce(reduction=MAX)), ("8 elements, sum)", "8 elements, max)")),
    ((reduce(), ("HcclAllGather", (ZEROS, Out((16,), "float32"), 8, FLOAT))), ("AllReduce(", "AllGather(")),
    ((("HcclBroadcast", (ZEROS, 8, FLOAT, 0)), ("HcclBroadcast", (ZEROS, 8, FLOAT, 1))), ("root 0)", "root 1)")),
    ((("HcclSend", (ZEROS, 8, FLOAT, 1)), ("HcclRecv", (Out((8,), "float32"), 4, FLOAT, 0))),
     ("Send(float32, 8", "Recv(float32, 4")),
    ((("HcclSend", (ZEROS, 8, FLOAT, 1)), ("HcclSend", (ZEROS, 8, FLOAT, 0))), ("Send(float32, 8", "Send(float32, 8")),
], ids=["count", "dtype", "reduction", "order", "root", "size", "both send"])
def test_a_disagreement_names_both_sides(tmp_path, calls, sides):
    answers = run(tmp_path, [calls], size=2)
    for rank, (own, other) in enumerate((sides, sides[::-1])):
        assert isinstance(answers[rank][0], str)
        said = answers[rank][0].partition(f"rank {rank} called ")[2]
        mine, _, theirs = said.partition(f", rank {1 - rank} called ")
        assert own in mine and other in theirs, answers[rank][0]


@pytest.mark.parametrize(("call", "words"), [
    (reduce(dtype=TYPES["float64"]), ("HcclAllReduce", "float64")),
    (reduce(dtype=TYPES["bfloat16"], reduction=PROD), ("HcclAllReduce", "bfloat16")),
    (("HcclBroadcast", (ZEROS, 8, FLOAT, 2)), ("HcclBroadcast", "rank 2 is not in group")),
    (("HcclAllReduce", (ZEROS, Out((8,), "float32"), 1 << 20, FLOAT, SUM)),
     ("HcclAllReduce", "4194304 bytes", "never allocated")),
], ids=["dtype", "product", "root", "beyond its memory"])
def test_a_wrong_call_is_refused(tmp_path, call, words):
    for (answer,) in run(tmp_path, [(call, call)], size=2):
        assert isinstance(answer, str) and all(word in answer for word in words), answer


def test_a_rank_that_stays_away_or_leaves_is_named(tmp_path):
    answers = run(tmp_path / "away", [(reduce(), ("aclrtSynchronizeDevice", ()))], size=2, HCCL_EXEC_TIMEOUT="0.5")
    assert "rank 0" in answers[0][0] and "rank 1" in answers[0][0], answers[0][0]
