"""How much memory and disk there is, and what is said of too little."""

import re
import shutil

import pytest

from telechat import InputError
from telechat.memory_check import available_bytes, check_disk, check_memory

STAT = "anon 5\ninactive_file 300\nactive_file 200"


@pytest.fixture
def machine(tmp_path):
    """A machine with 5,000 kB available, its /proc and its control groups: machine(limit, used, stat, group, version)."""
    meminfo, own = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:  5000 kB\n")
    own.write_text("")

    def available(limit=None, used="1000", stat=None, group="", version=2):
        root = tmp_path / "groups"
        shutil.rmtree(root, ignore_errors=True)
        folder = root / group
        folder.mkdir(parents=True)
        names = ("memory.max", "memory.current") if version == 2 else ("limit", "usage")
        for name, text in zip((*names, "memory.stat"), (limit, used, stat)):
            if text is not None:
                (folder / name).write_text(text + "\n")
        cached = ("inactive_file", "active_file") if version == 2 else ("total_inactive_file",)
        return available_bytes(meminfo, own, [(str(root), "" if version == 2 else "memory", *names, cached)])
    available.meminfo, available.own = meminfo, own
    return available


def test_it_is_the_systems_or_the_containers(machine, tmp_path):
    assert machine() == machine("max") == 5000 * 1024
    assert machine("31000") == 30_000 and machine("900") == 0
    assert machine("9223372036854771712", version=1) == 5000 * 1024
    assert machine("31000", version=1) == 30_000
    machine.meminfo.write_text("MemFree: 1 kB\n")
    assert machine("31000") is None


def test_the_page_cache_counts_as_free(machine):
    assert machine("31000", "20000", STAT) == 11_500
    assert machine("31000", "20000", "total_inactive_file 300", version=1) == 11_300


@pytest.mark.parametrize("own, version", [("0::/slurm/job_7/step\n", 2), ("4:cpu:/x\n9:memory:/slurm/job_7/step\n", 1)])
def test_the_limit_may_be_that_of_a_group_around_the_own_one(machine, own, version):
    machine.own.write_text(own)
    for group in ("slurm", "slurm/job_7", "slurm/job_7/step"):
        assert machine("31000", group=group, version=version) == 30_000
    assert machine("31000", group="slurm/job_8", version=version) == 5000 * 1024


def test_too_little_memory_is_one_sentence_with_what_takes_it(capsys):
    parts = {"framework": 6e8, "weights": 5.2e9, "trifle": 1e6}
    check_memory(parts, "training", "lower batch_size", 5.9e9)
    check_memory(parts, "training", "lower batch_size", None)
    with pytest.raises(InputError) as refused:
        check_memory(parts, "training", "lower batch_size", 5.8e9)
    assert str(refused.value) == ("training needs about 5.8 GB of memory (weights 5.2, framework 0.6), and 5.8 GB are "
                                  "available: lower batch_size, or give --ignore_memory to try it all the same")
    assert capsys.readouterr().err == ""
    check_memory(parts, "training", "lower batch_size", 5.8e9, ignore=True)
    assert re.fullmatch(r"warning: training needs about .*; going on as --ignore_memory says\n", capsys.readouterr().err)


def test_too_full_a_disk_is_one_sentence(tmp_path, monkeypatch, capsys):
    target = tmp_path / "not" / "there"
    usage = shutil.disk_usage(tmp_path)
    seen = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: seen.append(path) or usage._replace(free=2_000_000_000))
    check_disk(target, 2_000_000_000, "checkpoints", "lower keep_checkpoints")
    with pytest.raises(InputError) as refused:
        check_disk(target, 2_000_000_001, "checkpoints", "lower keep_checkpoints")
    assert str(refused.value) == (f"checkpoints will take 2.0 GB in {target}, where 2.0 GB are free: free space, lower "
                                  "keep_checkpoints, or give --ignore_memory to start all the same")
    check_disk(target, 3e9, "checkpoints", "lower keep_checkpoints", ignore=True)
    assert capsys.readouterr().err.startswith("warning: checkpoints will take 3.0 GB")
    assert set(seen) == {str(tmp_path)} and not target.parent.exists()
