"""Compiles the C++ operators for this machine, once, into the user's cache folder."""

import concurrent.futures
import ctypes
import fcntl
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

from telechat.nn.cores import own_cores
from telechat.nn.log import log_once

SOURCES = pathlib.Path(__file__).resolve().parent
ATTENTION_BLOCK = 64  # tokens between which attention makes scores at a time, in attention.h
# No -ffast-math: NaN and infinity must survive, and sums keep their order.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden",
         "-Wno-psabi")


def native_flags(machine=None):
    """Flags that make the compiler use all instructions of this machine (or of one called ``machine``)."""
    machine = machine or platform.machine()
    if machine in ("x86_64", "AMD64"):
        return ("-march=native", "-mprefer-vector-width=512")
    return ("-mcpu=native",) if machine in ("aarch64", "arm64") else ()


def compiler():
    """The C++ compiler's command: $CXX, else the first of g++, clang++ and c++; None where there is none."""
    return next((path for path in map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")))
                 if path), None)


def compile_library(command, target, flags):
    """Compile all sources into the shared library ``target``; RuntimeError with the compiler's words if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [os.path.join(folder, source.stem + ".o") for source in sources]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda pair: _run(command, *flags, "-c", str(pair[0]), "-o", pair[1]), zip(sources, objects)))
        _run(command, *flags, "-shared", *objects, "-o", str(target))


def _run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command[:1])}: {result.stderr.strip()[-2000:]}")


def _instructions():
    """What tells processors with different instructions apart."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def cache_folder():
    """Where compiled operators are kept: telechat/ in $XDG_CACHE_HOME, else in ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "telechat"


def built_library():
    """The compiled operators' path, compiled first where this machine has none of these sources yet.

    Several processes may ask at once: one compiles, the others wait. A file under its final name is complete.

    Raises:
        RuntimeError, OSError: there is no compiler, it failed, or the folder cannot be written.
    """
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler (g++ or clang++) was found")
    flags = (*FLAGS, *native_flags())
    key = hashlib.sha256(repr((command, flags, platform.machine(), _instructions())).encode())
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        key.update(source.name.encode() + source.read_bytes())
    folder = cache_folder()
    target = folder / f"operators-{key.hexdigest()[:24]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            part = folder / f"{target.name}.{os.getpid()}"
            try:
                compile_library(command, part, flags)
                os.replace(part, target)
            finally:
                part.unlink(missing_ok=True)
    return target


def default_threads():
    """How many threads operators use: $OMP_NUM_THREADS, else this process's share of the cores it may run on."""
    try:
        return max(int(os.environ["OMP_NUM_THREADS"].split(",")[0]), 1)
    except (KeyError, ValueError):
        return own_cores()


@functools.lru_cache(None)
def load_library():
    """The operators as a `ctypes.CDLL`; None, said once, where they cannot be compiled."""
    try:
        library = ctypes.CDLL(str(built_library()))
    except (RuntimeError, OSError) as error:
        log_once(f"portable operations: the operators for CPUs could not be compiled: {error}")
        return None
    library.set_thread_count(default_threads())
    return library


def library_path():
    """Path of the operators for `ops.Custom`; only where `load_library` gave them."""
    return load_library()._name
