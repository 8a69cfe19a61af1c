"""Servers of the same weights, ours and others', each a process of its own."""

import contextlib
import dataclasses
import http.client
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import psutil

from benchmarks.measure import ROOT, ChildFailed, run_child
from benchmarks.workspace import SIZES

STARTED_WITHIN = 300  # seconds
VOCABULARY = 1664  # of samples/tokenizer.model
PAGE = 256  # tokens of a block of transformers' cache, its default
LLAMA_SERVER = ROOT / "build" / "llama.cpp" / "build" / "bin" / "llama-server"


@dataclasses.dataclass(frozen=True)
class Side:
    """A server that can be started.

    Attributes:
        name (str): in tables.
        model (str): what requests call the model.
        command (list of str): with {port} where the port goes.
    """

    name: str
    model: str
    command: list


@dataclasses.dataclass
class Running:
    """A server that answers.

    Attributes:
        model (str): what requests call the model.
        port (int): at 127.0.0.1.
    """

    model: str
    port: int
    process: subprocess.Popen

    def peak_memory(self):
        """The most memory that the server and its children have had resident, each at its own time, in bytes."""
        root = psutil.Process(self.process.pid)
        statuses = [pathlib.Path(f"/proc/{process.pid}/status").read_text() for process in (root, *root.children(recursive=True))]
        return sum(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 for status in statuses)


def write_models(folder, size):
    """Random weights of a size (a key of `SIZES`) with the sample tokenizer, below ``folder`` (Path) in three forms, each once.

    Greedy answers hold whole characters alone: transformers 5.24 breaks a stream off at bytes that are none.

    Returns:
        (Path, Path, Path): ours, a LlamaForCausalLM directory, and a GGUF file, all float32.
    """
    ours, llama, gguf = folder / size, folder / f"{size}-llama", folder / f"{size}.gguf"
    if not ours.is_dir():
        run_child("servers", "write_weights", dict(fields=dict(SIZES[size], vocab_size=VOCABULARY), directory=str(ours)))
    for kind, target, flags in (("to-llama", llama, ["--output_dir", llama]), ("to-gguf", gguf, ["--output", gguf, "--type", "f32"])):
        if not target.exists():
            _convert([kind, "--mindspore_path", ours, *flags])
    return ours, llama, gguf


def write_weights(fields, directory):
    """In a child: the library's random weights, but for 0 in the head's rows of bytes and control tokens.

    A logit of 0 is never the largest of a thousand random ones, so that none of these is drawn greedily.
    """
    from telechat import Tokenizer
    from telechat.checkpoint.layout import parameter_shapes
    from telechat.checkpoint.writer import write_checkpoint
    from telechat.config import TeleChatConfig
    from telechat.model import initial_tensor

    config = TeleChatConfig(**fields)
    tokenizer = Tokenizer.from_pretrained(str(ROOT / "samples" / "tokenizer.model"))
    silent = [token for token in range(config.vocab_size) if not tokenizer.decode([token], skip_control_tokens=True).strip("\ufffd")]

    def tensors():
        for name, shape in parameter_shapes(config).items():
            tensor = initial_tensor(config, 0, name, shape)
            if name == "lm_head.weight":
                tensor[silent] = 0
            yield name, tensor

    write_checkpoint(directory, config, tensors())
    shutil.copy(ROOT / "samples" / "tokenizer.model", directory)
    return {}


def _convert(arguments):
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "convert.py"), *map(str, arguments)], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise ChildFailed(f"convert.py {arguments[0]} ended with status {done.returncode}:\n{done.stdout[-3000:]}")


def sides(models, sequences, length):
    """{name: `Side`} of all servers, each with room for ``sequences`` of ``length`` tokens at a time.

    Args:
        models (tuple of Path): of `write_models`.
    """
    ours, llama, gguf = map(str, models)
    scripts, count = os.path.dirname(sys.executable), str(sequences)
    every = [
        Side("telechat", "telechat",
             [sys.executable, str(ROOT / "tools" / "serve.py"), "--load_checkpoint", ours, "--model_name", "telechat", "--port",
              "{port}", "--max_batch", count, "--max_length", str(length)]),
        Side("transformers", llama,
             [os.path.join(scripts, "transformers"), "serve", llama, "--continuous-batching", "--device", "cpu", "--dtype",
              "float32", "--cb-num-blocks", str(sequences * length // PAGE), "--cb-max-batch-tokens", "2048", "--host",
              "127.0.0.1", "--port", "{port}"]),
        Side("llama.cpp", "llama.cpp",
             [str(LLAMA_SERVER), "--model", gguf, "--alias", "llama.cpp", "--parallel", count, "--ctx-size",
              str(sequences * length), "--cache-type-k", "f32", "--cache-type-v", "f32", "--host", "127.0.0.1", "--port",
              "{port}"])]
    return {side.name: side for side in every}


@contextlib.contextmanager
def running(side, folder):
    """`Running`, from when it answers until the block is left; what it says goes to a file below ``folder``.

    Raises:
        ChildFailed: it ended, or did not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output = folder / f"{side.name}.log"
    command = [word.replace("{port}", str(port)) for word in side.command]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with open(output, "w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   env={**os.environ, "PYTHONPATH": path, "GLOG_v": "3", "HF_HUB_OFFLINE": "1"})
    try:
        deadline = time.monotonic() + STARTED_WITHIN
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ChildFailed(f"{side.name} does not answer:\n{output.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)
        yield Running(side.model, port, process)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
