"""Run a script on many processes: python tools/launch.py -n 16 tools/train.py --config FILE key=value"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from telechat.cli import ArgumentParser, path_argument, run  # noqa: E402
from telechat.parallel.launcher import ONE_HOST_TIME_OUT, SEVERAL_NODES_TIME_OUT, Launch, launch  # noqa: E402


def main(argv=None):
    parser = ArgumentParser(
        usage="launch.py -n PROCESSES [--nodes N --node_rank I --master HOST:PORT] [--log_dir DIR] script.py …",
        description="Run a script on many processes under MindSpore's msrun, show rank 0's log, and at a failure "
                    "say which rank failed first and the end of its log.",
        formatter_class=argparse.HelpFormatter)
    parser.add_argument("-n", "--processes", type=int, required=True, help="on all nodes together")
    parser.add_argument("--nodes", type=int, default=1, help="machines; start launch.py on each of them")
    parser.add_argument("--node_rank", type=int, default=0, help="this machine's number, from 0")
    parser.add_argument("--master", metavar="HOST:PORT",
                        help="address of node 0 and a port free there; if left out on one machine, a free port")
    parser.add_argument("--log_dir", type=path_argument,
                        help="for worker_<rank>.log; if left out, a new directory under logs/")
    parser.add_argument("--cluster_time_out", type=int, metavar="SECONDS",
                        help="that the processes wait for each other at the start: if left out, "
                             f"{ONE_HOST_TIME_OUT} on one machine, {SEVERAL_NODES_TIME_OUT} on several")
    parser.add_argument("script", type=path_argument, help="what to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own, handed on as they are")
    return launch(Launch(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    run(main)
