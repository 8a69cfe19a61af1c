"""Operators of the old road on the simulated card against torch. Their inputs and attributes: CANN's prototypes of ops."""

import pytest

from simulator.environment import unavailable

if unavailable():
    pytest.skip(unavailable(), allow_module_level=True)

import torch  # noqa: E402

from tests.simulator.aclnn import Constant, Out, Refused, call_old, empty  # noqa: E402


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def constant(*values, dtype=torch.int64):
    return Constant(torch.tensor(values, dtype=dtype))


def test_gathers():
    table, ids = normal(5, 3, dtype=torch.bfloat16), torch.tensor([[4, 0], [1, 4]], dtype=torch.int32)
    taken = call_old("GatherV2", [table, ids, constant(0)], [empty(2, 2, 3, dtype=table.dtype)], batch_dims=0)
    assert torch.equal(taken, table[ids.long()])
    columns = call_old("GatherV2", [table, ids[1] // 2, constant(1)], [empty(5, 2, dtype=table.dtype)])
    assert torch.equal(columns, table[:, [0, 2]])
    places = torch.tensor([[4, 2], [0, 1]])
    assert torch.equal(call_old("GatherNd", [table, places], [empty(2, dtype=table.dtype)]), table[[4, 0], [2, 1]])
    with pytest.raises(Refused, match="index 5 is outside an axis of 5"):
        call_old("GatherV2", [table, ids + 1, constant(0)], [empty(2, 2, 3, dtype=table.dtype)])
    with pytest.raises(Refused, match="must be a constant"):
        call_old("GatherV2", [table, ids, torch.tensor([0])], [empty(2, 2, 3, dtype=table.dtype)])


def test_sums_by_segment_add_up_in_float32():
    """Thirty-two rows of 1/64 on 16: in bfloat16 each would be lost."""
    rows = torch.full((33, 2), 1 / 64, dtype=torch.bfloat16)
    rows[0] = 16
    total = call_old("UnsortedSegmentSum", [rows, torch.full((33,), 1), constant(3)], [empty(3, 2, dtype=torch.bfloat16)])
    assert total.tolist() == [[0, 0], [16.5, 16.5], [0, 0]]


def test_slices_and_their_gradient():
    x = normal(4, 6)
    bounds = constant(1, 0), constant(4, -1), constant(2, 1)
    expected = x[1:4:2, :-1]
    assert torch.equal(call_old("StridedSlice", [x, *bounds], [empty(2, 5)], begin_mask=2, end_mask=0), expected)
    assert torch.equal(call_old("StridedSlice", [x, *bounds], [empty(6)], begin_mask=2, end_mask=2, shrink_axis_mask=1),
                       x[1])
    incoming, result = normal(2, 5), torch.zeros(4, 6)
    result[1:4:2, :-1] = incoming
    assert torch.equal(call_old("StridedSliceGrad", [constant(4, 6), *bounds, incoming], [empty(4, 6)], begin_mask=2),
                       result)
    halves = call_old("Split", [constant(1, dtype=torch.int32), x], [empty(4, 3), empty(4, 3)], num_split=2)
    assert torch.equal(torch.cat(halves, 1), x)
    assert torch.equal(call_old("Pack", [x, x + 1], [empty(4, 2, 6)], axis=1, N=2), torch.stack((x, x + 1), 1))
    assert torch.equal(call_old("Transpose", [x, constant(1, 0)], [empty(6, 4)]), x.t())


def test_variables_are_written_in_place():
    weight = normal(5, 3, dtype=torch.bfloat16)
    variable = Out(weight.clone())
    added = call_old("AssignAdd", [variable, torch.ones(5, 3, dtype=torch.bfloat16)], [variable])
    assert torch.equal(added, (weight.float() + 1).bfloat16())
    rows, variable = normal(2, 3, dtype=torch.bfloat16), Out(weight.clone())
    expected = weight.clone()
    expected[[4, 0]] = rows
    assert torch.equal(call_old("ScatterUpdate", [variable, torch.tensor([4, 0]), rows], [variable]), expected)


def test_arithmetic():
    x, y = normal(3, 4), normal(3, 4, seed=1)
    assert torch.equal(call_old("AddN", [x, y, x], [empty(3, 4)], N=3), x + y + x)
    for name, function in (("ReduceSum", torch.sum), ("ReduceMean", torch.mean), ("ReduceMax", torch.amax)):
        result = call_old(name, [x, constant(1)], [empty(3, 1)], keep_dims=True)
        assert torch.allclose(result, function(x, 1, keepdim=True), atol=1e-6)
    product = call_old("BatchMatMul", [normal(2, 3, 4), normal(2, 5, 4)], [empty(2, 3, 5)], adj_x1=False, adj_x2=True)
    assert torch.allclose(product, normal(2, 3, 4) @ normal(2, 5, 4).transpose(1, 2), atol=1e-6)


def test_adam_equals_torch():
    weight = normal(7)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.95), eps=0.0)  # CANN adds epsilon before correction
    first, second = torch.zeros(7), torch.zeros(7)
    for step in (1, 2, 3):
        parameter.grad = normal(7, seed=step)
        optimizer.step()
        variables = [Out(weight), Out(first), Out(second)]
        scalars = [torch.tensor(value) for value in (0.9**step, 0.95**step, 0.01, 0.9, 0.95, 0.0)]
        weight, first, second = call_old("ApplyAdam", [*variables, *scalars, parameter.grad], variables)
        assert torch.allclose(weight, parameter.detach(), atol=1e-6)


@pytest.mark.parametrize("name, inputs, output", [
    ("AddN", [torch.ones(2, dtype=torch.int8)], torch.int8),
    ("StridedSliceGrad", [constant(2), constant(0), constant(1), constant(1), torch.ones(1, dtype=torch.int64)],
     torch.int64),
    ("ReduceSum", [torch.ones(2, 2, dtype=torch.bool), constant(0)], torch.bool),
])
def test_dtypes_that_the_card_does_not_have(name, inputs, output):
    with pytest.raises(Refused, match="the card has no such operator for"):
        call_old(name, inputs, [empty(2, dtype=output)])


def test_an_operator_that_is_not_there_is_refused_by_name():
    with pytest.raises(Refused, match="TopKV9.*float32 .3,4."):
        call_old("TopKV9", [normal(3, 4)], [empty(3, 4)])
