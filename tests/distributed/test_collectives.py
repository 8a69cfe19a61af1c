"""Every collective, forward and backward, against a float64 model of what all ranks hold."""

import json

import numpy as np
import pytest

EPSILON = {"float32": 2.0 ** -23, "float16": 2.0 ** -10, "bfloat16": 2.0 ** -7, "int32": 0, "int64": 0}

# By number of processes: the size of the tensor-parallel groups; the gradients to check, as group, dtype
# and how often the collective is applied in a row; the exact collectives to check. Of four processes
# "tensor" is (0, 1), (2, 3), "data" is (0, 2), (1, 3) and "pipeline" is groups of one.
PLAN = {
    2: dict(tensor=2,
            gradients=[("tensor", "float32", 1), ("tensor", "float32", 2), ("tensor", "float16", 1),
                       ("tensor", "bfloat16", 1), ("pipeline", "float32", 1)],
            exact=[("tensor", "float32"), ("tensor", "float16"), ("tensor", "bfloat16")]),
    4: dict(tensor=2,
            gradients=[("data", "float32", 1), ("world", "float32", 2), ("world", "bfloat16", 1)],
            exact=[("world", "float32"), ("world", "bfloat16")]),
}
KINDS = ("tensor", "data", "world", "pipeline")
GRADIENTS = [(count, *case) for count, plan in PLAN.items() for case in plan["gradients"]]
EXACT = [(count, *case) for count, plan in PLAN.items() for case in plan["exact"]]


# What the collectives do, on the list of what all ranks of a group hold; one forward, one backward each.

def same(values):
    return values


def total(values):
    return [sum(values)] * len(values)


def gather(values):
    return [np.concatenate(values)] * len(values)


def own_rows(values):
    return [np.split(value, len(values))[rank] for rank, value in enumerate(values)]


def scatter(values):
    return own_rows(total(values))


def maximum(values):
    return [np.max(values, axis=0)] * len(values)


def nothing(values):
    return [np.zeros_like(value) for value in values]


MODEL = {"CopyTo": (same, total), "ReduceFrom": (total, same), "GatherRows": (gather, scatter),
         "ScatterRows": (scatter, gather), "AllReduceSum": (total, nothing), "AllReduceMax": (maximum, nothing)}


def forward(cell, values, times):
    for _ in range(times):
        values = MODEL[cell][0](values)
    return values


def backward(cell, values, inputs, times):
    for _ in range(times):
        values = MODEL[cell][1](values)
    # What stops the gradient answers with zeros of the input's shape.
    return [np.zeros_like(x) if MODEL[cell][1] is nothing else value for value, x in zip(values, inputs)]


class Results:
    """What the ranks of a job stored."""

    def __init__(self, folder, count):
        self.arrays = [dict(np.load(folder / f"rank_{rank}.npz")) for rank in range(count)]
        self.facts = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(count)]

    def groups(self, kind):
        """The groups of one kind, each a list of ranks."""
        return sorted({tuple(facts["groups"][kind]) for facts in self.facts})

    def of(self, ranks, name):
        return [self.arrays[rank][name].astype(np.float64) for rank in ranks]


@pytest.fixture(scope="module")
def jobs(msrun_in, tmp_path_factory):
    """jobs(number of processes) → `Results`; each job runs once."""
    done = {}

    def call(count):
        if count not in done:
            folder = tmp_path_factory.mktemp(f"collectives_{count}")
            plan = PLAN[count]
            msrun_in(folder, count, "collectives.py", json.dumps({"tensor": plan["tensor"]}), folder,
                     json.dumps(plan["gradients"]), json.dumps(plan["exact"]), timeout=300)
            done[count] = Results(folder, count)
        return done[count]
    return call


def assert_close(actual, expected, tolerance):
    assert len(actual) == len(expected)
    for mine, reference in zip(actual, expected):
        assert mine.shape == reference.shape
        assert np.abs(mine - reference).max() <= tolerance * max(np.abs(reference).max(), 1)


def test_groups(jobs):
    results = jobs(4)
    assert results.groups("tensor") == [(0, 1), (2, 3)]
    assert results.groups("data") == [(0, 2), (1, 3)]
    assert results.groups("world") == [(0, 1, 2, 3)]
    assert results.groups("pipeline") == [(0,), (1,), (2,), (3,)]


@pytest.mark.parametrize("mode", ["eager", "compiled", "again"])
@pytest.mark.parametrize("cell", MODEL)
@pytest.mark.parametrize("count, kind, dtype, times", GRADIENTS)
def test_forward_and_gradient(jobs, count, kind, dtype, times, cell, mode):
    """The job differentiates Σ cell(2·x)·w: the gradient in w is the forward result."""
    results = jobs(count)
    prefix = f"{kind}/{cell}/{dtype}/{times}/{mode}"
    for ranks in results.groups(kind):
        xs, ws = results.of(ranks, f"{prefix}/x"), results.of(ranks, f"{prefix}/w")
        ys = forward(cell, [2 * x for x in xs], times)
        dxs = [2 * dx for dx in backward(cell, ws, xs, times)]
        # Each of up to `size` additions, `times` over, may round once.
        tolerance = EPSILON[dtype] * len(ranks) * times
        assert_close(results.of(ranks, f"{prefix}/y"), ys, tolerance)
        assert_close(results.of(ranks, f"{prefix}/dx"), dxs, tolerance)


@pytest.mark.parametrize("cell", ["GatherRows", "AllReduceMax"])
@pytest.mark.parametrize("count, kind, dtype", EXACT)
def test_extreme_values_are_exact(jobs, count, kind, dtype, cell):
    """Infinities, −1e30 and 1e-30 come through to the last bit; the maximum of negative numbers is negative."""
    results = jobs(count)
    for ranks in results.groups(kind):
        xs = results.of(ranks, f"{kind}/exact/{dtype}/x")
        assert np.isneginf(xs[0]).any() and np.isposinf(xs[0]).any()
        if cell == "AllReduceMax":
            assert maximum(xs)[0][0, 0] == -7
        for mine, expected in zip(results.of(ranks, f"{kind}/exact/{dtype}/{cell}"), MODEL[cell][0](xs)):
            assert np.array_equal(mine, expected)


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", PLAN)
def test_functions(jobs, count, kind, dtype):
    """Whole numbers up to 200, which every dtype sums exactly."""
    results = jobs(count)
    prefix = f"{kind}/functions/{dtype}"
    for ranks in results.groups(kind):
        xs = results.of(ranks, f"{prefix}/x")
        expected = {"all_reduce": total(xs), "all_gather_rows": gather(xs), "reduce_scatter_rows": scatter(xs)}
        for source, x in enumerate(xs):
            expected[f"broadcast {source}"] = [x] * len(xs)
        for name, values in expected.items():
            assert_close(results.of(ranks, f"{prefix}/{name}"), values, 0)
    assert all(facts[f"{kind}/{dtype}/argument unchanged"] for facts in results.facts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", PLAN)
def test_messages(jobs, count, kind):
    """All send three messages to each other before any receives; collectives afterwards are undisturbed."""
    results = jobs(count)
    for facts in results.facts:
        for dtype in EPSILON:
            right = facts[f"{kind}/{dtype}/messages"]
            assert len(right) == 3 * (len(facts["groups"][kind]) - 1)
            assert all(right)
        assert facts[f"{kind}/afterwards"] == [True, True]


@pytest.mark.parametrize("count", PLAN)
def test_one_forward_one_backward(jobs, count):
    """Activations gain 1 from stage to stage, gradients 2, in the order of the micro-batches."""
    for stage, facts in enumerate(jobs(count).facts):
        assert facts["one forward one backward"] == {
            "forward": [100 * number + stage for number in range(6)],
            "backward": [1000 * number + 2 * (count - 1 - stage) for number in range(6)]}


@pytest.mark.parametrize("count", PLAN)
def test_barrier_objects_and_refusals(jobs, count):
    for facts in jobs(count).facts:
        assert facts["barrier"]
        assert facts["objects"] == [{"rank": rank, "text": "智" * rank} for rank in range(count)]
        assert len(facts["refused"]) == 2
        sentence = f"{2 * count + 1} rows cannot be cut into {count} equal parts"
        assert all(sentence in refusal for refusal in facts["refused"])
