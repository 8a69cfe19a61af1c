"""Rank 0 serves under msrun, is its own client for a while, and stops by SIGTERM; writes the answers to a file.

Arguments: checkpoint, port, path of the requests (JSON: list of bodies), path of the answers (JSON: the list of them,
then what /metrics says), more arguments of tools/serve.py.
"""

import concurrent.futures
import importlib.util
import json
import os
import pathlib
import signal
import sys
import threading
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[3]
spec = importlib.util.spec_from_file_location("serve", ROOT / "tools" / "serve.py")
serve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(serve)


def get(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as response:
        return json.load(response)


def be_client(url, requests, answers):
    while True:
        try:
            get(f"{url}/health")
            break
        except urllib.error.URLError:
            time.sleep(0.2)
    with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
        got = list(pool.map(lambda body: get(f"{url}/v1/completions", body), requests))
    with urllib.request.urlopen(f"{url}/metrics") as response:
        metrics = response.read().decode()
    pathlib.Path(answers).write_text(json.dumps([got, metrics]), encoding="utf-8")
    time.sleep(6)  # long enough for a heartbeat of the idle loop
    get(f"{url}/v1/completions", requests[0])
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    checkpoint, port, requests, answers, *more = sys.argv[1:]
    if os.environ.get("RANK_ID") == "0" and os.environ.get("MS_ROLE") != "MS_SCHED":
        threading.Thread(target=be_client, daemon=True, args=(
            f"http://127.0.0.1:{port}", json.loads(pathlib.Path(requests).read_text(encoding="utf-8")), answers)).start()
    sys.exit(serve.main(["--load_checkpoint", checkpoint, "--port", port, *more]))
