"""Which kernels a model has: decided once, from the device, the model and what the user asked for."""

import mindspore as ms

from telechat.errors import InputError
from telechat.nn.ascend import AscendKernels
from telechat.nn.device import on_cpu
from telechat.nn.flash_attention import obstacle as flash_obstacle
from telechat.nn.inference import has_inference_kernels
from telechat.nn.kernels import Kernels, choose_launching_thread
from telechat.nn.log import log_once
from telechat.nn.paged_attention import obstacle as paged_obstacle

CHOICES = ("ascend", "cpu", "portable")


def choose_kernels(config, dtype, kernels=None, use_flash_attention=None, use_paged_attention=None):
    """The `Kernels` of a model.

    Args:
        config (TeleChatConfig): sizes, position bias, dropout.
        dtype: of the weights, a MindSpore dtype.
        kernels (str): "ascend", "cpu" (operators of our own, compiled when first needed) or "portable"; None: what
            the device has. "ascend" on a CPU gives kernels whose graphs can be compiled but not run
            (`Kernels.require_device`).
        use_flash_attention (bool): False: portable attention in training and prefill; True: refuse a
            model that flash attention cannot serve; None: flash attention where it can.
        use_paged_attention (bool): the same of decoding on a cache in blocks, which a process that was prepared
            for inference alone can have (`use_inference_kernels`).

    Raises:
        InputError: an argument is wrong, or flash or paged attention was asked for and cannot be had.
    """
    choose_launching_thread()
    if kernels not in (None, *CHOICES):
        raise InputError(f'kernels must be "ascend", "cpu" or "portable", not {kernels!r}')
    for name, wanted in (("use_flash_attention", use_flash_attention), ("use_paged_attention", use_paged_attention)):
        if wanted not in (None, True, False):
            raise InputError(f"{name} must be true or false, not {wanted!r}")
    if kernels in ("portable", "cpu") or (kernels is None and on_cpu()):
        where = "a CPU has no such kernel" if on_cpu() else f'kernels is "{kernels}"'
        _refuse_unless(use_flash_attention, "use_flash_attention", where)
        _refuse_unless(use_paged_attention, "use_paged_attention", where)
        obstacle = "" if kernels == "portable" else cpu_obstacle(dtype)
        if obstacle is None:
            from telechat.nn.cpu.kernels import CpuKernels

            return CpuKernels(1 - config.attention_dropout, dtype)
        if kernels == "cpu":
            raise InputError(f'kernels is "cpu" and {obstacle}; set kernels to "portable" or leave it out')
        # A CPU has no bfloat16 product and a slow float16 one: it computes in float32.
        return Kernels(ms.float32 if on_cpu() else dtype, keep_prob=1 - config.attention_dropout)
    obstacle = flash_obstacle(dtype, config.head_dim)
    _refuse_unless(use_flash_attention, "use_flash_attention", obstacle)
    if obstacle and use_flash_attention is None:
        log_once(f"attention by portable operations: {obstacle}")
    not_paged = paged_obstacle(config, dtype)
    if not_paged is None and not has_inference_kernels():
        not_paged = "this process was not prepared for inference alone (telechat.nn.inference)"
    elif not_paged and use_paged_attention is None:
        log_once(f"decoding by portable operations: {not_paged}")
    _refuse_unless(use_paged_attention, "use_paged_attention", not_paged)
    return AscendKernels(dtype, flash=not obstacle and use_flash_attention is not False,
                         paged=not not_paged and use_paged_attention is not False, keep_prob=1 - config.attention_dropout,
                         quantised=has_inference_kernels())


def _refuse_unless(wanted, name, obstacle):
    """InputError where an obstacle stands before what was asked for."""
    if wanted and obstacle:
        raise InputError(f"{name} is true and {obstacle}; set it to false or leave it out")


def cpu_obstacle(dtype):
    """Why a model with weights in ``dtype`` cannot have the operators for CPUs, as half a sentence; None where it can."""
    from telechat.nn.cpu.build import load_library

    if not on_cpu():
        return f"the device is {ms.get_context('device_target')}"
    if dtype == ms.float16:
        return "its operators take weights in float32 or bfloat16, not float16"
    return "its operators could not be compiled" if load_library() is None else None
