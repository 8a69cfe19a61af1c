"""MindSpore's internal kernels, which decode on a cache in blocks on Ascend.

PagedAttention, ReshapeAndCache and ApplyRotaryPosEmb exist among them alone, and MindSpore takes them only with
``infer_boost`` on, which is one setting for the whole process, stays on, and counts from the first graph. With it
FlashAttentionScore would be an internal kernel too, without a gradient and for other layouts, and Swiglu one that
fails in 2.10; both are kept out. A process that trains never switches it on.
"""

import os

import mindspore as ms

from telechat.nn.device import on_cpu

# Read by MindSpore when it first looks for a kernel.
_KEPT_OUT = ("MS_DISABLE_INTERNAL_KERNELS_LIST", ("FlashAttentionScore", "Swiglu"))
_state = {"on": False}


def use_inference_kernels():
    """Prepare this process for generation and nothing else; to be called before anything is computed.

    On a CPU there is nothing to prepare.
    """
    if on_cpu() or _state["on"]:
        return
    name, kept_out = _KEPT_OUT
    others = [kernel for kernel in os.environ.get(name, "").split(",") if kernel and kernel not in kept_out]
    os.environ[name] = ",".join([*kept_out, *others])
    ms.set_context(jit_config={"jit_level": "O0", "infer_boost": "on"})
    _state["on"] = True


def has_inference_kernels():
    """Whether `use_inference_kernels` has prepared this process."""
    return _state["on"]
