"""Which tests may notice a fault, those most likely to first."""

import json

import coverage

MOST_FILES = 10  # test files that judge a module besides the tests that run its lines, those named like it first


class Selection:
    """What recorder.py found in ``folder``: seconds of each test that passes, and the tests that run a line."""

    def __init__(self, root, folder):
        self.root = root
        self.seconds = {}
        for path in folder.glob("tests-*.json"):
            tests = json.loads(path.read_text(encoding="utf-8"))
            self.seconds.update({name: test["seconds"] for name, test in tests.items() if test["passed"]})
        combined = coverage.Coverage(str(folder / "all"), config_file=False)
        combined.combine([str(path) for path in folder.glob("lines.*")], keep=True)
        self.lines = combined.get_data()

    def tests(self, module, lines):
        """Two lists of test ids: those that run one of ``lines`` of a module, and others that are about the module.

        Where no test is known to run the lines (code that runs on import, or that MindSpore compiles), the first are
        those that run anything of the module.
        """
        recorded = [path for path in self.lines.measured_files() if path.endswith(f"/{module.as_posix()}")]
        ran = self.lines.contexts_by_lineno(recorded[0]) if recorded else {}
        touching = {test for line in lines for test in ran.get(line, ())} & self.seconds.keys()
        if not touching:
            touching = {test for tests in ran.values() for test in tests} & self.seconds.keys()
        files = [path.relative_to(self.root).as_posix() for path in test_files(self.root, module)]
        others = {test for test in self.seconds if test.partition("::")[0] in files} - touching

        def order(test):
            """The module's own test files first, in each the quick tests first."""
            file = test.partition("::")[0]
            return files.index(file) if file in files else len(files), file, self.seconds[test], test
        return sorted(touching, key=order), sorted(others, key=order)


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
