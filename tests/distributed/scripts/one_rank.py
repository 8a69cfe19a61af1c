"""tools/train.py with something else on rank 1: one_rank.py OTHER.json arguments …

OTHER.json: {"arguments": what rank 1 adds, "project": the folder whose code rank 1 runs, "directories": where
rank 0 and rank 1 run}.
"""

import json
import os
import pathlib
import runpy
import sys

with open(sys.argv.pop(1), encoding="utf-8") as file:
    other = json.load(file)
os.chdir(other["directories"][os.environ["RANK_ID"] == "1"])
project = str(pathlib.Path(__file__).resolve().parents[3])
if os.environ["RANK_ID"] == "1" and os.environ["MS_ROLE"] == "MS_WORKER":
    sys.argv += other["arguments"]
    project = other["project"]
sys.path[:] = [path for path in sys.path if not os.path.exists(os.path.join(path, "telechat"))]
script = os.path.join(project, "tools", "train.py")
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
