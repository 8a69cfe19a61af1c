"""Small faults put into the code one at a time, to see whether the tests notice: make test-mutation.

    python -m tests.mutation --count 300 --seed 17 --folder build/mutation

First all tests of the folders of `TESTS` are run once and recorded: which runs which lines (recorder.py). Then the faults are
drawn at random from `FOLDERS` (faults.py), each is put into a copy of the project, and the tests that run its line and those
that are about its module are run there until the first failure (selection.py, judge.py). At the end the tests that noticed
anything are run on the code as it is; what one of them "noticed" that fails there too is not counted. tests/mutation.md says
of the faults that nothing noticed why they are let be.

Everything is kept in --folder as it comes, the copy that is judged included, and the same command goes on where it was broken
off. With --again the faults that nothing has noticed are judged anew by the test files that have changed in the project since.
"""

import argparse
import compileall
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

from tests.conftest import ROOT
from tests.mutation.faults import draw, mutate
from tests.mutation.judge import Running, preload
from tests.mutation.selection import Selection

FOLDERS = ("data", "checkpoint", "generation", "evaluation", "training", "serving")
TESTS = (*FOLDERS, "tools", "wrong_use", "adapters", "quantization", "export", "parallel", "ascend", "")
LEFT_OUT = ("test_documentation.py", "test_documented_commands.py", "test_web.py")  # about the project as a whole
AT_ONCE = 2
QUICK = 10  # seconds of tests that are tried first


def copy_project(folder):
    """Bring the project as it is into ``folder``/project/<its name>; returns that path."""
    copied = folder / "project" / ROOT.name
    shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(".git", ".venv", "build", "demo", "__pycache__", "*.egg-info"))
    if (ROOT.parent / "shared").is_dir():
        (copied.parent / "shared").symlink_to(ROOT.parent / "shared")
    return copied


def test_paths(root):
    """The test files that judge, below the project's folder."""
    paths = [path for name in TESTS for path in sorted((root / "tests" / name).glob("test_*.py")) if path.name not in LEFT_OUT]
    return [path.relative_to(root) for path in paths]


def bring_changed_tests(copied):
    """Bring into the copy the test files and fixtures that have changed in the project; returns the test files."""
    every = [path.relative_to(ROOT) for path in sorted((ROOT / "tests").rglob("*")) if path.suffix != ".pyc" and path.is_file()]
    changed = [path for path in every
               if not (copied / path).exists() or (copied / path).read_bytes() != (ROOT / path).read_bytes()]
    for path in changed:
        (copied / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copied / path)
    return [path for path in test_paths(ROOT) if path in changed]


def record(copied, files, folder):
    """Run test files of the copy once, recorded in ``folder``."""
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", str(AT_ONCE), "--dist", "loadfile", "-p", "no:cacheprovider",
                    "-p", "tests.mutation.recorder", *map(str, files)], cwd=copied, check=False,
                   env={**os.environ, "PYTHONPATH": str(copied), "MUTATION_RECORD": str(folder)})


class Judgement:
    """One fault in a copy of its own, and its tests, stage after stage until one fails. Poll `record`."""

    def __init__(self, copied, selection, module, place, limit):
        self.copied, self.module, self.place, self.limit = copied, module, place, limit
        self.seconds = selection.seconds
        self.source = (copied / module).read_text(encoding="utf-8")
        changed, self.what, lines = mutate(self.source, place)
        self.stages = [stage for stage in self._stages(*selection.tests(module, lines)) if stage]
        self._write(changed)
        self.running, self.judged = None, 0

    def _stages(self, touching, others):
        """The quick tests that run the line, the rest of them, and others about the module, within the limit in seconds."""
        quick = self._take(touching, QUICK)
        yield quick
        yield self._take(touching[len(quick):], self.limit)
        yield self._take(others, self.limit / 2)

    def _take(self, tests, limit):
        taken, total = [], 0
        for test in tests:
            total += self.seconds[test]
            if total > limit and taken:
                break
            taken.append(test)
        return taken

    def _write(self, text):
        path = self.copied / self.module
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()  # it is told apart by size and second alone
        path.write_text(text, encoding="utf-8")

    def record(self):
        """None while tests run; then what has been found."""
        if self.running is None:
            if not self.stages:
                return self._end(False, None)
            self.running = Running(self.copied, self.stages[0], sum(self.seconds[test] for test in self.stages[0]))
            return None
        done = self.running.finished()
        if done is None:
            return None
        self.judged += len(self.stages.pop(0))
        self.running = None
        return None if done[0] else self._end(True, done[1])

    def _end(self, noticed, failed):
        self._write(self.source)
        return {"file": str(self.module), "place": self.place, "change": self.what, "noticed": noticed, "by": failed,
                "tests": self.judged}


def judge_all(faults, copies, selection, limit, keep):
    """Judge faults, as many at a time as there are copies; calls ``keep`` with each record."""
    waiting, busy = list(faults), {}
    while waiting or busy:
        for copied in copies:
            if copied not in busy and waiting:
                busy[copied] = Judgement(copied, selection, *waiting.pop(0), limit)
            if copied in busy:
                found = busy[copied].record()
                if found:
                    del busy[copied]
                    keep(found)
        time.sleep(0.05)


def failing_anyway(copied, selection, records):
    """Those of the tests that noticed a fault that fail in the unchanged copy too."""
    tests = sorted({record["by"][0] for record in records if record["by"] and record["by"][0] in selection.seconds})
    failing = set()
    for test in {test.partition("::")[0]: None for test in tests}:
        alone = [name for name in tests if name.startswith(f"{test}::")]
        while alone:
            running = Running(copied, alone, sum(selection.seconds[name] for name in alone))
            while (done := running.finished()) is None:
                time.sleep(0.05)
            if done[0]:
                break
            failing.add(done[1][0])
            alone = [name for name in alone if name != done[1][0]]
    return failing


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--folder", default="build/mutation")
    parser.add_argument("--folders", nargs="+", choices=FOLDERS, default=FOLDERS)
    parser.add_argument("--limit", type=float, default=120, help="seconds of tests a fault is judged by")
    parser.add_argument("--again", action="store_true", help="judge anew, by what changed in tests/, what was not noticed")
    arguments = parser.parse_args()
    folder = pathlib.Path(arguments.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    copied = folder / "project" / ROOT.name
    recorded = folder / "record"
    if not copied.exists():
        copy_project(folder)
    if not recorded.exists():
        record(copied, test_paths(copied), recorded)
    if arguments.again:
        recorded = folder / f"record-{time.strftime('%H%M%S')}"
        record(copied, bring_changed_tests(copied), recorded)
    compileall.compile_dir(copied / "telechat", quiet=2)
    selection = Selection(copied, recorded)
    preload()

    results = folder / "results.jsonl"
    known = {}
    if results.exists():
        for line in results.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            known[found["file"], found["place"]] = found
    faults, judged = draw(copied, arguments.count, arguments.seed, arguments.folders), []
    waiting = []
    for module, place in faults:
        found = known.get((str(module), place))
        if found and (found["noticed"] or not arguments.again):
            judged.append(found)
        else:
            waiting.append((module, place))

    def keep(found):
        judged.append(found)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found, ensure_ascii=False) + "\n")
        word = "noticed " if found["noticed"] else "SURVIVED"
        print(f"{len(judged):4d} {word} {found['file']} {found['change']}", flush=True)

    copies = []
    for number in range(AT_ONCE):
        copies.append(folder / f"copy{number}" / ROOT.name)
        shutil.rmtree(copies[-1].parent, ignore_errors=True)
        shutil.copytree(copied.parent, copies[-1].parent, symlinks=True)
    judge_all(waiting, copies, selection, arguments.limit, keep)
    wrong = failing_anyway(copies[0], selection, judged)
    for found in judged:
        if found["by"] and found["by"][0] in wrong:
            found["noticed"] = False
            print(f"not counted, {found['by'][0]} fails anyway: {found['file']} {found['change']}")
    noticed = sum(found["noticed"] for found in judged)
    print(f"{noticed} of {len(judged)} noticed ({noticed / len(judged):.1%}), "
          f"{sum(found['by'] == ['time limit', ''] for found in judged)} of them by the time limit")
    for found in judged:
        if not found["noticed"]:
            print(f"SURVIVED {found['file']} {found['change']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
