"""Conversion streams: its memory does not grow with the checkpoint."""

import os
import pathlib
import subprocess
import sys

import pytest

from telechat.checkpoint.layout import parameter_shapes
from telechat.checkpoint.reader import CheckpointReader
from telechat.config import TeleChatConfig

pytest.importorskip("torch", reason="conversion needs torch: install the extra `convert`")

ROOT = pathlib.Path(__file__).resolve().parents[2]

MEMORY = f"""
import pathlib, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import mindspore, torch
from telechat.checkpoint.convert import ms_to_torch, torch_to_ms
def anonymous():  # what the process itself holds: pages of mapped files are the page cache's
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024
start = anonymous()
def peak(call):
    highest, running = 0, True
    def watch():
        nonlocal highest
        while running:
            highest = max(highest, anonymous())
            time.sleep(0.002)
    thread = threading.Thread(target=watch, daemon=True)  # an error ends the process
    thread.start()
    call()
    running = False
    thread.join()
    print(highest - start)
peak(lambda: torch_to_ms("zip", "ms", dtype="bfloat16"))
peak(lambda: ms_to_torch("ms", "back", max_shard_bytes=24_000_000))
peak(lambda: torch_to_ms("old", "ms", dtype="bfloat16"))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the process's memory from /proc")
def test_memory_is_one_shard_and_one_tensor(tmp_path, make_official, write_official):
    """A 52B-style checkpoint of 310 MB in 6 shards, cast and transposed on the way."""
    config, state = make_official("52b", hidden=1024, heads=8, layers=6, inner=2816, vocab=1024)
    size = sum(tensor.numel() * 4 for tensor in state.values())
    tensor = max(tensor.numel() * 4 for tensor in state.values())
    assert size > 310e6 and tensor < 24e6
    write_official(config, state, name="zip", shards=6)
    write_official(config, state, name="old", shards=6, zip_format=False)
    result = subprocess.run([sys.executable, "-c", MEMORY], cwd=tmp_path, capture_output=True, text=True)
    mapped, back, whole_files = map(int, result.stdout.split())
    # Mapped files cost nothing: there is one tensor, transposed and cast.
    assert mapped < 2 * tensor < size / 6
    # Back, a .bin file is in memory while it is written, and the parts of one tensor.
    assert back < 24e6 + 2 * tensor < size / 4
    # Files in torch's old format are read whole, one by one; the allocator keeps a tensor or so.
    assert whole_files < size / 6 + 3 * tensor < size / 2
    CheckpointReader(tmp_path / "ms").check(parameter_shapes(TeleChatConfig.from_pretrained(tmp_path / "ms")))
