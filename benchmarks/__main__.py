"""Measure the library against plain torch and rewrite the tables and plots of benchmarks/README.md.

    python -m benchmarks
    python -m benchmarks --only decode --quick

A quick run measures little and prints its tables; nothing is rewritten.
"""

import datetime
import importlib.util
import json
import os
import pathlib
import platform
import signal
import sys
import tempfile
from importlib import metadata

from benchmarks import (attention, compiling, decoding, growth, large, leaks, plot, preprocessing, prefill, report,
                        training)
from benchmarks.measure import ROOT, ChildFailed, NumbersDiffer
from benchmarks.workspace import Workspace
from telechat.cli import ArgumentParser, run
from telechat.errors import InputError

SUBJECTS = {"train": training, "compile": compiling, "decode": decoding, "prefill": prefill, "attention": attention,
            "large": large, "preprocess": preprocessing, "growth": growth, "leaks": leaks}
FOLDER = ROOT / "benchmarks"
RESULTS = FOLDER / "results.json"
PAGES = [FOLDER / "README.md", FOLDER / "README_zh.md"]


def conditions():
    """Machine, versions and date of a measurement, as one line."""
    processor = platform.processor() or platform.machine()
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":")[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("mindspore", "torch", "numpy"))
    return (f"{datetime.date.today().isoformat()}; {processor}, {os.cpu_count()} cores, {memory / 1e9:.0f} GB; "
            f"Python {platform.python_version()}, {versions}; load average before: {os.getloadavg()[0]:.1f}")


def publish(results):
    """Rewrite tables and plots from ``{subject: {"conditions": …, "section": …}}``."""
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sections = {name: report.Section.from_dict(results[name]["section"]) for name in SUBJECTS if name in results}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, section in sections.items():
            content = f"*{results[name]['conditions']}*\n\n{report.markdown(section)}"
            text = report.replace_between(text, name, content)
        page.write_text(text, encoding="utf-8")
    plot.draw_results(list(sections.values()), FOLDER / "results.png")
    if "growth" in sections:
        plot.draw_growth(sections["growth"], FOLDER / "growth.png")


def main():
    parser = ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SUBJECTS, help="measure this alone")
    parser.add_argument("--quick", action="store_true", help="small and short; prints, rewrites nothing")
    parser.add_argument("--rounds", type=int, help="how often each side is started; default: 3, quick: 1")
    parser.add_argument("--scratch", help="where to make a temporary folder for weights, 13 GB; default: the system's")
    args = parser.parse_args()
    rounds = (1 if args.quick else 3) if args.rounds is None else args.rounds
    if rounds < 1:
        raise InputError(f"--rounds must be at least 1, not {rounds}")
    # An exit, so that the measurement under way is ended and the folder removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if importlib.util.find_spec("torch") is None:
        raise InputError("torch is not installed, and is what the library is measured against; "
                         "pip install -e '.[dev]' brings it")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    failed = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        workspace = Workspace(pathlib.Path(folder), args.quick, rounds)
        for name in [args.only] if args.only else SUBJECTS:
            print(f"{name}:", flush=True)
            before = f"{conditions()}; rounds: {rounds}"
            try:
                section = SUBJECTS[name].run(workspace)
            except (ChildFailed, NumbersDiffer) as error:
                print(f"{name} failed: {error}", file=sys.stderr, flush=True)
                failed.append(name)
                continue
            print(report.markdown(section), flush=True)
            if not args.quick:
                results[name] = {"conditions": before, "section": section.to_dict()}
                publish(results)  # after each, so that a run broken off leaves what it had
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    run(main)
