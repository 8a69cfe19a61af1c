"""scripts/serve.py on simulated cards of unequal memory: its first argument is SIM_MEMORY of each rank, "400MB,300MB".

Each process prints the cache that its own card has room for.
"""

import os
import pathlib
import runpy
import sys

os.environ["SIM_MEMORY"] = sys.argv.pop(1).split(",")[int(os.environ.get("RANK_ID", "0"))]  # before MindSpore is imported

from telechat.generation import card_memory  # noqa: E402

plan_card_cache = card_memory.plan_card_cache


def told(*arguments):
    plan = plan_card_cache(*arguments)
    print("this card alone:", *plan, flush=True)
    return plan


card_memory.plan_card_cache = told
runpy.run_path(str(pathlib.Path(__file__).with_name("serve.py")), run_name="__main__")
