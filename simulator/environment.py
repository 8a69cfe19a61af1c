"""What a process needs in its environment to run MindSpore's Ascend back end on the simulated card.

    python simulator/environment.py python tools/train.py …      runs a command on the simulated card

MindSpore reads the variables while it is imported, so they are given to a new process and never set in a running one.
"""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

MINDSPORE_VERSION = "2.10.0"  # the private classes and symbols stood in for are this version's
BUILD = Path(__file__).resolve().parent.parent / "build" / "simulator"


def unsupported() -> str | None:
    """Why the simulated card cannot be built here; None if it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the simulated card is for Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    try:
        version = importlib.metadata.version("mindspore")
    except importlib.metadata.PackageNotFoundError:
        return f"the simulated card needs mindspore {MINDSPORE_VERSION}, which is not installed"
    if version != MINDSPORE_VERSION:
        return f"the simulated card stands in for what mindspore {MINDSPORE_VERSION} needs of CANN; installed is {version}"
    return None


def unavailable() -> str | None:
    """Why nothing can run on the simulated card here; None if it can."""
    reason = unsupported()
    if reason is None and not (BUILD / "cann" / "lib64" / "libascendcl.so").exists():
        return "the simulated card is not built: make simulator"
    return reason


def environment(base: dict[str, str] | None = None, **settings: str) -> dict[str, str]:
    """A copy of `base` (this process's environment) for a process on the simulated card.

    settings: variables of the simulator, such as SIM_MEMORY="64GB" or SIM_LOG="file" (simulator/README.md), or any other.
    Raises RuntimeError where unavailable() gives a reason.
    """
    reason = unavailable()
    if reason:
        raise RuntimeError(reason)
    result = dict(os.environ if base is None else base)
    cann = BUILD / "cann"
    result |= {"ASCEND_HOME_PATH": str(cann), "ASCEND_TOOLKIT_HOME": str(cann), "ASCEND_OPP_PATH": str(cann / "opp")}
    libraries = [str(cann / "lib64"), str(cann / "lib64" / "driver"), result.get("LD_LIBRARY_PATH", "")]
    result["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    package = str(Path(__file__).resolve().parent / "python")  # hccl
    result["PYTHONPATH"] = ":".join(filter(None, [package, result.get("PYTHONPATH", "")]))
    # Not by MindSpore's other library of collectives, which calls what the simulated card has not.
    result.setdefault("MS_ENABLE_LCCL", "off")
    # The wheel's own library of internal kernels would be found before LD_LIBRARY_PATH's: RPATH goes first.
    internal = cann / "lib64" / "libms_kernels_internal.so"
    if internal.exists():
        result["LD_PRELOAD"] = " ".join(filter(None, [str(internal), result.get("LD_PRELOAD", "")]))
    return result | settings


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit("usage: python simulator/environment.py COMMAND [ARGUMENT …]")
    if sys.argv[1] == "--unsupported":  # for the Makefile: the reason, or nothing
        print(unsupported() or "")
        return
    try:
        os.execvpe(sys.argv[1], sys.argv[1:], environment())
    except (RuntimeError, OSError) as error:
        sys.exit(f"environment.py: {error}")


if __name__ == "__main__":
    main()
