"""Whatever the library launches in training and generation, a 910B has a kernel for in these dtypes.

That is CANN's own table of operators (8.1.RC1, ../shared/ascend); what is not in it would run on the card's own CPU or not
at all. The simulated card is asked what was launched.
"""

import json
import re

import pytest

from simulator.report import read
from tests.conftest import save_small_model

# Of an operation the kernel, and which of the operation's tensors are the kernel's inputs and outputs, in the table's order:
# - where one is not given. Of lists of tensors, which are of one dtype, the first.
ACLNN = {
    "Abs": ("Abs", "self out"), "Addmm": ("MatMulV3", "mat1 mat2 - - out"),
    "ApplyAdamWV2": ("ApplyAdamWV2", "varRef mRef vRef grad step -"), "Cast": ("Cast", "self out"),
    "CrossEntropyLoss": ("CrossEntropyLoss", "input target - lossOut logProbOut - -"),
    "CrossEntropyLossGrad": ("CrossEntropyLossGrad", "gradLoss logProb target - - - out"),
    "FlashAttentionScore": ("FlashAttentionScore", "query key value realShift dropMask - attenMask - - - - - "
                            "softmaxMaxOut softmaxSumOut softmaxOutOut attentionOutOut"),
    "FlashAttentionScoreGrad": ("FlashAttentionScoreGrad", "query key value dy realShift dropMask - attenMask softmaxMax "
                                "softmaxSum softmaxIn attentionIn - - - - - dqOut dkOut dvOut -"),
    "GeTensor": ("GreaterEqual", "self other out"), "InplaceCopy": ("ViewCopy", "selfRef - - - - - - - selfRef"),  # of another dtype src is cast before
    "InplaceOne": ("OnesLike", "selfRef selfRef"), "InplaceZero": ("ZerosLike", "selfRef selfRef"),
    "LinalgVectorNorm": ("LpNormV2", "self -"),  # the sum of squares is kept in float32
    "LogicalOr": ("LogicalOr", "self other out"), **dict.fromkeys(("Matmul", "Mm"), ("MatMulV3", "self mat2 - - out")),
    "Max": ("ReduceMax", "self - out"), "Muls": ("Muls", "self out"), "Neg": ("Neg", "self out"),
    "NeTensor": ("NotEqual", "self other out"), "Permute": ("Transpose", "self - out"), "ReduceSum": ("ReduceSum", "self - out"),
    "Repeat": ("Tile", "self - out"), "RmsNorm": ("RmsNorm", "x gamma yOut rstdOut"),
    "RmsNormGrad": ("RmsNormGrad", "dy x rstd gamma dxOut dgammaOut"),
    "RotaryPositionEmbedding": ("RotaryPositionEmbedding", "x cos sin out"), "SplitWithSize": ("SplitV", "self - - out[0]"),
    "Sub": ("Sub", "self other out"), "SWhere": ("SelectV2", "condition self other out"), "SwiGlu": ("SwiGlu", "x out"),
    "SwiGluGrad": ("SwiGluGrad", "yGrad x out"),
}
for plain, packed in (("Score", "VarLenScore"), ("ScoreGrad", "UnpaddingScoreGrad")):
    ACLNN[f"FlashAttention{packed}"] = ACLNN[f"FlashAttention{plain}"]
BY_THE_OLD_ROAD = {
    "AddN": "input[0] output[0]", "GatherV2": "input[0] input[1] - output[0]", "ReduceSum": "input[0] - output[0]",
    "ScatterUpdate": "input[0] input[1] input[2] output[0]", "Split": "- input[1] output[0]",
    "StridedSlice": "input[0] - - - output[0]", "StridedSliceGrad": "- - - - input[4] output[0]",
}
KERNELS = {**{f"aclnn{name}": kernel for name, kernel in ACLNN.items()},
           **{name: (name, tensors) for name, tensors in BY_THE_OLD_ROAD.items()}}
# Their kernels take what is given, as far as the table says: it lists no dtypes for them.
OF_ANY_DTYPE = {"aclnnAdd": "Add", "aclnnMul": "Mul", "aclnnCat": "ConcatD", "aclnnDropoutDoMask": "DropOutDoMask",
                "Pack": "Pack", "aclnnStack": "Pack",
                "aclnnSoftmax": "SoftmaxV2", "UnsortedSegmentSum": "UnsortedSegmentSum"}
NOT_LISTED = {"aclnnDropoutGenMaskV2"}  # a unit of the card's own draws, which the table of kernels does not have
DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
TENSOR = re.compile(rf"(?:^|, )([\w\[\]]+) ({'|'.join(DTYPES)}) \(")


@pytest.fixture(scope="module")
def launched(card, tmp_path_factory):
    """{operation: {what it was given, as a tuple of (name, dtype)}}, of training and generation in each dtype."""
    folder, found = tmp_path_factory.mktemp("launched"), {}
    save_small_model(folder / "model", hidden_size=64, n_layer=2)
    runs = [("steps", 2, dtype, 1.0) for dtype in ("float32", "bfloat16", "float16")]
    runs += [("features", ["documents and dropout", "documents, ALiBi and dropout", "padding"], "bfloat16")]
    runs += [("generation", str(folder / "model"), [[4, 5, 6], [9, 10]], 3, dtype) for dtype in ("float32", "bfloat16", "float16")]
    for run in runs:
        card(*run, SIM_LOG=str(folder / "log"))
        for event in read(str(folder / "log")):
            if event.kind == "launch" and not event.name.startswith("Internal"):  # those: test_internal_limits.py
                found.setdefault(event.name, set()).add(tuple(TENSOR.findall(event.details)))
    return found


@pytest.mark.ascend
def test_the_card_has_a_kernel_for_all(shared, launched):
    table = json.loads((shared / "ascend" / "ops_910b_cann81.json").read_text())
    unknown = launched.keys() - {*KERNELS, *OF_ANY_DTYPE, *NOT_LISTED}
    assert not unknown and len(launched) > 30
    assert not [key for kernel in OF_ANY_DTYPE.values() for key in table[kernel] if "dtype" in table[kernel][key]]
    wrong = []
    for name in sorted(launched.keys() & KERNELS.keys()):
        kernel, tensors = KERNELS[name]
        columns = columns_of(table[kernel], len(tensors.split()))
        for given in launched[name]:
            dtypes = [dict(given).get(tensor) for tensor in tensors.split()]
            assert any(dtypes), (name, given)
            if not any(all(ours in (None, theirs) for ours, theirs in zip(dtypes, column)) for column in columns):
                wrong.append((name, given))
    assert not wrong


def columns_of(entry, count):
    """The combinations of dtypes that a kernel takes: of each of its inputs, then of its outputs."""
    keys = [f"{kind}{number}" for kind in ("input", "output") for number in range(count) if f"{kind}{number}" in entry]
    assert len(keys) == count, entry.keys()
    return list(zip(*([{"float": "float32"}.get(dtype, dtype) for dtype in entry[key]["dtype"].split(",")] for key in keys),
                    strict=True))
