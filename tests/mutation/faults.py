"""Small faults put into the code one at a time, to see whether the tests notice: make test-mutation.

    python -m tests.mutation --count 300 --seed 17 --results build/mutants.jsonl

A fault is a swapped comparison, sum, product or connective, a condition turned round, a number one larger. They are drawn
at random from the folders of `FOLDERS`, each is put into a copy of the project, and the test files of the module and of its
folder are run there until the first failure. What nothing notices is printed at the end; tests/mutation.md says of those found
so far why they are let be. The same seed draws the same faults while the code stays as it is. Results are kept as they
come, and the same command goes on where it was broken off.
"""

import argparse
import ast
import copy
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

from tests.conftest import ROOT

FOLDERS = ("data", "checkpoint", "generation", "evaluation", "training", "serving")
SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
         ast.Mult: ast.FloorDiv, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.And: ast.Or, ast.Or: ast.And}
TIMEOUT = 600  # seconds; a fault that makes the tests hang has been noticed
MOST_FILES = 10  # test files a module is judged by, those named like it first


def places(tree):
    """What can be changed in a module: (node, name of what) in the order of the source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield node, "comparison"
        elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS and not _is_text(node):
            yield node, "operator"
        elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield node, "condition"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node, "number"


def _is_text(node):
    """Whether an operation is about strings, where another operator is a TypeError at once."""
    operands = (node.left, node.right) if isinstance(node, ast.BinOp) else ()
    return any(isinstance(part, (ast.JoinedStr, ast.List)) or isinstance(part, ast.Constant) and isinstance(part.value, str)
               for part in operands)


def mutate(source, number):
    """The source with its place ``number`` changed, and a line that tells what changed."""
    tree = ast.parse(source)
    node, kind = list(places(tree))[number]
    before = ast.unparse(copy.deepcopy(getattr(node, "test", node)))
    if kind == "comparison":
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif kind == "operator":
        node.op = SWAPS[type(node.op)]()
    elif kind == "condition":
        node.test = ast.UnaryOp(ast.Not(), node.test)
    else:
        node.value += 1
    return ast.unparse(tree), f"line {node.lineno}: {before[:60]} → {ast.unparse(getattr(node, 'test', node))[:60]}"


def test_files(root, module):
    """The test files of a module (a path below the project): those of its name, those that import it, its folder's."""
    dotted = module.with_suffix("").as_posix().replace("/", ".")
    package, _, name = dotted.rpartition(".")
    words = (f"{dotted} ", f"{dotted}\n", f"from {package} import {name}", f"{dotted}.")
    found = [path for path in sorted((root / "tests").rglob("test_*.py"))
             if "distributed" not in path.parts and any(word in path.read_text(encoding="utf-8") for word in words)]
    own = [path for path in sorted((root / "tests" / module.parts[1]).rglob("test_*.py")) if name in path.stem]
    near = sorted((root / "tests" / module.parts[1]).rglob("test_*.py"))
    return list(dict.fromkeys([*own, *found, *near]))[:MOST_FILES]


def draw(root, count, seed, folders):
    """(module, place) of the faults in the project at ``root``, at random and without repetition."""
    every = []
    for folder in folders:
        for path in sorted((root / "telechat" / folder).rglob("*.py")):
            number = sum(1 for _ in places(ast.parse(path.read_text(encoding="utf-8"))))
            every += [(path.relative_to(root), place) for place in range(number)]
    return random.Random(seed).sample(every, min(count, len(every)))


def is_noticed(copied, module):
    """Whether the tests of the project's copy fail."""
    files = [str(path.relative_to(copied)) for path in test_files(copied, module)]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(command, cwd=copied, env={**os.environ, "PYTHONPATH": str(copied)}, timeout=TIMEOUT,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except subprocess.TimeoutExpired:
        return True
    if done.returncode not in (0, 1, 2):  # 2: a module that can no longer be imported
        raise RuntimeError(f"pytest ended with status {done.returncode}: {done.stdout[-500:]}")
    return done.returncode != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--results", default="build/mutants.jsonl")
    parser.add_argument("--folders", nargs="+", choices=FOLDERS, default=FOLDERS)
    arguments = parser.parse_args()
    results = pathlib.Path(arguments.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    known = {}
    if results.exists():
        known = {(record["file"], record["change"]): record for record in map(json.loads, results.read_text().splitlines())}
    judged = []
    with tempfile.TemporaryDirectory() as folder:
        copied = pathlib.Path(folder) / "project" / ROOT.name
        shutil.copytree(ROOT, copied, ignore=shutil.ignore_patterns(".git", ".venv", "build", "demo", "__pycache__"))
        if (ROOT.parent / "shared").is_dir():
            (copied.parent / "shared").symlink_to(ROOT.parent / "shared")
        # From the copy: what is edited in the project meanwhile belongs to another run.
        for module, place in draw(copied, arguments.count, arguments.seed, arguments.folders):
            source = (copied / module).read_text(encoding="utf-8")
            changed, what = mutate(source, place)
            record = known.get((str(module), what))
            if record is None:
                (copied / module).write_text(changed, encoding="utf-8")
                record = {"file": str(module), "change": what, "noticed": is_noticed(copied, module)}
                (copied / module).write_text(source, encoding="utf-8")
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
            judged.append(record)
            print(f"{len(judged):4d} {'noticed ' if record['noticed'] else 'SURVIVED'} {module} {what}", flush=True)
    survivors = [record for record in judged if not record["noticed"]]
    print(f"{len(judged) - len(survivors)} of {len(judged)} noticed ({1 - len(survivors) / len(judged):.0%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
