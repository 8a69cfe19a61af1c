"""tools/train.py with something else on rank 1: one_rank.py OTHER.json arguments …

OTHER.json: {"arguments": what rank 1 adds, "project": the folder whose code rank 1 runs, "directories": where
rank 0 and rank 1 run, "late": seconds by which each of the two starts after the others, "stop": seconds after which rank
0 is stopped}.
"""

import json
import os
import pathlib
import runpy
import subprocess
import sys
import time

with open(sys.argv.pop(1), encoding="utf-8") as file:
    other = json.load(file)


def stop_after(seconds):
    """Have this process stopped then, every thread of it, as one of a machine that no longer answers."""
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -STOP {os.getpid()}; sleep 60; kill -CONT {os.getpid()}"])


second = os.environ["RANK_ID"] == "1"
os.chdir(other["directories"][second])
project = str(pathlib.Path(__file__).resolve().parents[3])
if os.environ["MS_ROLE"] == "MS_WORKER":
    time.sleep(other["late"][second])
    if other["stop"] and not second:
        stop_after(other["stop"])
if second and os.environ["MS_ROLE"] == "MS_WORKER":
    sys.argv += other["arguments"]
    project = other["project"]
sys.path[:] = [path for path in sys.path if not os.path.exists(os.path.join(path, "telechat"))]
script = os.path.join(project, "tools", "train.py")
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
