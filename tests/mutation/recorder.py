"""A pytest plugin that records which tests run which lines of the package, in the tools they start too.

    pytest -p tests.mutation.recorder …        with MUTATION_RECORD naming an existing folder

Coverage of a test is kept under its id. A started process finds sitecustomize.py in that folder, which records its lines
under the test that is running (PYTEST_CURRENT_TEST). Seconds and outcome of each test go to a file of their own.
"""

import json
import os
import pathlib

import coverage
import pytest

FOLDER = pathlib.Path(os.environ["MUTATION_RECORD"])
SITE = '''
import atexit, os
test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
if test:
    import coverage
    started = coverage.Coverage({data!r}, data_suffix=True, source={source!r}, context=test, config_file=False)
    started.start()
    atexit.register(lambda: (started.stop(), started.save()))
'''


def start(source):
    """A running coverage of the folder ``source``; processes started from now on record theirs."""
    data = str(FOLDER / "lines")
    (FOLDER / "sitecustomize.py").write_text(SITE.format(data=data, source=[source]), encoding="utf-8")
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(FOLDER)])
    recording = coverage.Coverage(data, data_suffix=True, source=[source], config_file=False)
    recording.start()
    return recording


class Recorder:
    """Switches coverage from test to test and adds up what each took."""

    def __init__(self, source):
        self.recording = start(source)
        self.tests = {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self.recording.switch_context(item.nodeid)
        yield
        self.recording.switch_context("")

    def pytest_runtest_logreport(self, report):
        test = self.tests.setdefault(report.nodeid, {"seconds": 0, "passed": False})
        test["seconds"] += report.duration
        if report.when == "call":
            test["passed"] = report.passed

    def pytest_sessionfinish(self):
        self.recording.stop()
        self.recording.save()
        (FOLDER / f"tests-{os.getpid()}.json").write_text(json.dumps(self.tests), encoding="utf-8")


def pytest_configure(config):
    # Under pytest-xdist tests run in the workers alone.
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.register(Recorder(str(config.rootpath / "telechat")))
