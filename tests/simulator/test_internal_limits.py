"""The simulator's internal kernels take and refuse what the wheel's own library takes and refuses."""

import itertools
import random

import pytest

from simulator.environment import unavailable

if unavailable():
    pytest.skip(unavailable(), allow_module_level=True)

from tests.simulator.internal_library import libraries  # noqa: E402

FLOAT16, FLOAT32, INT8, INT32, INT64, UINT8, BFLOAT16, BOOL, NONE = 1, 2, 4, 6, 7, 8, 12, 13, 17
TYPES = (FLOAT16, FLOAT32, INT8, INT32, INT64, UINT8, BFLOAT16, BOOL, NONE)
KERNELS = {  # inputs and outputs that it takes in bfloat16
    "MatMul": ([BFLOAT16] * 2, [BFLOAT16]),
    "AddRmsNorm": ([BFLOAT16] * 3, [BFLOAT16, FLOAT32, BFLOAT16]),
    "Gather": ([BFLOAT16, INT32], [BFLOAT16]),
    "ApplyRotaryPosEmb": ([BFLOAT16] * 4 + [INT32], [BFLOAT16] * 2),
    "SwiGLU": ([BFLOAT16], [BFLOAT16]),
    "Swish": ([BFLOAT16], [BFLOAT16]),
    "Softmax": ([FLOAT32], [FLOAT32]),
    "PagedAttention": ([BFLOAT16] * 3 + [INT32] * 2 + [NONE] * 4, [BFLOAT16]),
    "FlashAttentionScore": ([BFLOAT16] * 3 + [NONE] * 2, [BFLOAT16]),
    "ReshapeAndCache": ([BFLOAT16] * 4 + [INT32], []),
}
WHOLE = 2147483647
BSH, BNSD, SBH, BSND = range(4)
ATB = {"MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST": "PagedAttention"}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return libraries(tmp_path_factory.mktemp("internal"))


def agree(both, questions, **variables):
    """What both libraries answer: {question: yes or no}."""
    questions = list(questions)
    wheel, simulated = (library.ask(questions, **variables) for library in both)
    differ = [(question, yes) for question, yes, other in zip(questions, wheel, simulated) if yes != other]
    assert not differ, f"the wheel's answers: {differ}"
    return dict(zip(questions, wheel))


def variations(inputs, outputs):
    """The types themselves, each place in turn of each type, one type for another everywhere, and some at random."""
    types, count = [*inputs, *outputs], len(inputs)
    yield types
    for place, other in itertools.product(range(len(types)), TYPES):
        yield [*types[:place], other, *types[place + 1:]]
    for old, new in itertools.product(set(types), TYPES):
        yield [new if each == old else each for each in types]
    chance = random.Random(count)
    for _ in range(100):
        yield [chance.choice((each, each, *TYPES)) for each in types]


def test_dtypes(both):
    questions = []
    for kernel, (inputs, outputs) in KERNELS.items():
        for types in variations(inputs, outputs):
            if kernel == "ReshapeAndCache" and types[1] == NONE:
                continue  # the wheel then looks at the key alone, and would write it into a cache of any dtype
            questions.append(f"dtypes {kernel} {len(inputs)} {' '.join(map(str, types))}")
    answers = agree(both, questions)
    for kernel in KERNELS:
        given = [yes for question, yes in answers.items() if question.split()[1] == kernel]
        assert any(given) and not all(given), kernel
    in_bfloat16 = " ".join(map(str, [BFLOAT16] * 3 + [NONE]))
    assert not answers[f"dtypes FlashAttentionScore 5 {in_bfloat16} {UINT8} {BFLOAT16}"]  # such a mask is aclnn's


@pytest.mark.parametrize(("question", "taken"), {
    "3 8 8 128 64 1": True, "3 8 8 160 64 1": True, "3 8 2 32 16 1": True, "3 8 8 128 64 0": True, "3 8 8 256 64 1": True,
    "3 8 8 160 128 1": False,  # 12B's heads: head_dim · block is above 16,384
    "2 8 8 128 64 1": False,  # two dimensions
    "3 8 8 24 64 1": False, "3 8 8 272 32 1": False, "3 8 8 128 48 1": False, "3 129 1 128 64 1": False,
    "3 8 8 128 8 1": False, "3 128 1 128 64 1": True}.items())
def test_paged_attention(both, question, taken):
    assert agree(both, [f"paged {question}"]) == {f"paged {question}": taken}


def test_workspace_of_paged_attention(both):
    """24 cores · (16.25 MiB + 7, or in float16 3, KiB a token that a sequence has room for, up to 16,384)."""
    questions = [f"paged 3 {heads} 8 {dim} {block} 1 {dtype} {width}" for heads, dim in ((8, 64), (32, 128))
                 for block in (16, 64, 128) for dtype in (FLOAT16, BFLOAT16) for width in (1, 8, 64, 500)]
    wheel, simulated = (library.workspaces(questions) for library in both)
    assert wheel == simulated and min(wheel) > 4e8


def test_paged_attention_of_atb_takes_two_dimensions(both):
    """ATB's kernel itself is not found without a card: only the simulator is asked."""
    questions = ["paged 2 8 8 128 64 1", "paged 3 8 8 128 64 1", "paged 2 8 8 128 64 0"]
    assert both[1].ask(questions, **ATB) == [True, True, False]


def test_flash_attention(both):
    whole, triangle = f"{WHOLE} {WHOLE}", f"{WHOLE} 0"
    taken = [f"flash {BSH} 0 {whole} 128 {NONE} 32 32", f"flash {BSH} 0 {triangle} 128 {NONE} 32 32",
             f"flash {BSH} 0 {whole} 160 {NONE} 32 32", f"flash {BNSD} 0 {whole} 128 {NONE} 32 32",
             f"flash {BSH} 0 {whole} 128 {NONE} 16 32"]
    refused = [f"flash {BSH} 0 {triangle} 160 {NONE} 32 32", f"flash {BSH} 0 {whole} 24 {NONE} 32 32",
               f"flash {BSH} 0 {whole} 272 {NONE} 32 32", f"flash {BSH} 2 {whole} 128 {NONE} 32 32",
               f"flash {BSND} 0 {whole} 128 {NONE} 32 32", f"flash {SBH} 0 {whole} 128 {NONE} 32 32",
               f"flash {BSH} 0 {whole} 128 {NONE} 32 16", f"flash {BSH} 0 8 8 128 {NONE} 32 32"]
    assert agree(both, taken + refused) == {**dict.fromkeys(taken, True), **dict.fromkeys(refused, False)}


def test_reshape_and_cache(both):
    taken = ["cache 2 4 128", "cache 3 4 5"]
    refused = ["cache 2 4 129", "cache 4 4 5", "cache 2 2 5"]
    assert agree(both, taken + refused) == {**dict.fromkeys(taken, True), **dict.fromkeys(refused, False)}


@pytest.mark.parametrize("rank, cache_rank, tokens, taken", [
    (2, 4, 5, True), (2, 4, 128, True), (2, 4, 129, False), (4, 4, 5, False), (2, 2, 5, False)])
def test_binding_and_kernel_refuse_the_same_writes(both, rank, cache_rank, tokens, taken):
    """Keys of 4 heads of 16 into 8 blocks of 16 tokens: asked of the wheel's library, the simulator and our binding."""
    import mindspore as ms

    from telechat.errors import InputError
    from telechat.nn import paged_attention as binding

    question = f"cache {rank} {cache_rank} {tokens}"
    assert agree(both, [question]) == {question: taken}
    key, cache = {2: (tokens, 64), 4: (tokens, 1, 4, 16)}[rank], {4: (8, 16, 4, 16), 2: (128, 64)}[cache_rank]
    try:
        binding._check_cache(cache, cache, ms.bfloat16)
        binding._check_written(key, key, ms.bfloat16, (tokens,), ms.int32, cache, ms.bfloat16)
        let_pass = True
    except InputError:
        let_pass = False
    assert let_pass == taken


def test_the_blocks_that_telechat_chooses_are_taken_and_larger_ones_are_not(both):
    from telechat.nn.paged_attention import LARGEST_HEAD, block_size

    heads = range(16, LARGEST_HEAD + 1, 16)
    chosen = [f"paged 3 8 8 {dim} {block_size(dim)} 1" for dim in heads]
    beyond = [f"paged 3 8 8 {dim} {2 * block_size(dim)} 1" for dim in heads] + [f"paged 3 8 8 {LARGEST_HEAD + 16} 16 1"]
    assert agree(both, chosen + beyond) == {**dict.fromkeys(chosen, True), **dict.fromkeys(beyond, False)}


@pytest.mark.parametrize("heads, kv_heads, dim, block, taken", [
    (8, 2, 128, 64, True), (8, 8, 128, 128, True), (8, 8, 160, 64, True), (8, 8, 256, 64, True), (128, 1, 64, 16, True),
    (8, 8, 160, 128, False), (8, 8, 256, 128, False), (8, 8, 24, 64, False), (8, 8, 272, 32, False), (8, 8, 128, 48, False),
    (8, 8, 128, 8, False), (8, 8, 16, 256, False), (129, 1, 128, 64, False)])
def test_binding_and_kernel_refuse_the_same_caches(both, heads, kv_heads, dim, block, taken):
    """Each limit of PagedAttention, asked of the wheel's library, of the simulator and of telechat's binding."""
    import mindspore as ms

    from telechat.errors import InputError
    from telechat.nn import paged_attention as binding

    question = f"paged 3 {heads} {kv_heads} {dim} {block} 1"
    assert agree(both, [question]) == {question: taken}
    cache = (8, block, kv_heads, dim)
    try:
        binding._check_cache(cache, cache, ms.bfloat16)
        binding._check_query((2, heads * dim), ms.bfloat16, (2, 4), ms.int32, (2,), ms.int32, cache, ms.bfloat16)
        let_pass = True
    except InputError:
        let_pass = False
    assert let_pass == taken
