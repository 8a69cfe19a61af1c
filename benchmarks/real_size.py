"""A checkpoint of TeleChat-1B's shape, as a new user would go through the README: python benchmarks/real_size.py

    python benchmarks/real_size.py --folder /mnt/large            # 15 GB of disk; 24 GB of memory and 2 cores will do
    python benchmarks/real_size.py --folder /tmp/walk --small     # the same walk with a small model, in minutes

Random bfloat16 weights are written in the published layout, several shards, and the walk goes convert, inspect, generate,
evaluate, serve, train. Each step is a command of the README in a process of its own. Printed is a table: what was run,
whether it did or refused, how long it took, its peak of resident memory, and the promise that it kept or broke: an
answer, a figure within 15 % of its own estimate, or a refusal in one sentence before the weights were read. Ends with
status 1 where a promise was broken.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

REAL = dict(vocab_size=120000, hidden_size=2048, n_layer=16, n_head=32, ffn_hidden_size=5460, seq_length=8192)
SMALL = dict(vocab_size=4096, hidden_size=256, n_layer=4, n_head=8, ffn_hidden_size=704, seq_length=512)
TOKENIZER = ROOT / "samples" / "tokenizer.model"
TOLERANCE = 0.15  # of a run's memory against what it says before its first step
LEAST_ALLOWED = 0.2e9  # bytes: what MindSpore itself takes varies by as much
REFUSED_WITHIN = 60  # seconds: no weights have been read by then
STOPPED_WITHIN = 3  # seconds: a server without clients
STREAMS, ANSWER = 8, 12  # clients of a server at once, and tokens of each answer


@dataclasses.dataclass
class Step:
    """One command of the walk and what became of it."""

    name: str
    status: int
    seconds: float
    peak: int  # bytes resident
    output: str
    promise: str = ""
    kept: bool = True

    def line(self):
        """A row of the table."""
        outcome = "done" if self.status == 0 else "refused" if self.status == 2 else f"status {self.status}"
        return (f"| {self.name} | {outcome} | {self.seconds:.0f} s | {self.peak / 1e9:.2f} GB | {self.promise} | "
                f"{'kept' if self.kept else 'BROKEN'} |")


def run(name, *command, timeout=7200):
    """`Step` of a tool with its arguments."""
    words = [sys.executable, str(ROOT / "tools" / command[0]), *map(str, command[1:])]
    with tempfile.NamedTemporaryFile("w+", errors="replace") as said:
        started = time.monotonic()
        process = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        deadline = started + timeout
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                process.kill()
            time.sleep(0.2)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        step = Step(name, process.returncode, time.monotonic() - started, usage.ru_maxrss * 1024, said.read())
    print(f"{name}: status {step.status}, {step.seconds:.0f} s, {step.peak / 1e9:.2f} GB", flush=True)
    return step


def promised(step, promise, kept):
    """The step with what it had to keep."""
    step.promise, step.kept = promise, bool(kept)
    if not kept:
        print(step.output[-2000:], flush=True)
    return step


def refuses(step, *words):
    """That a step is refused in one sentence with ``words``, before weights are read."""
    lines = [line for line in step.output.splitlines() if line.startswith("error: ")]
    return promised(step, f"one sentence with {', '.join(words)}",
                    step.status == 2 and step.seconds < REFUSED_WITHIN and len(lines) == 1
                    and all(word in lines[0] for word in words))


def trains(step):
    """That a run's peak is what it said before its first step."""
    said = re.search(r"memory +about ([\d.]+) GB", step.output)
    expected = float(said[1]) * 1e9 if said else 0
    allowed = max(TOLERANCE * expected, LEAST_ALLOWED)
    return promised(step, f"{expected / 1e9:.2f} GB said, {TOLERANCE:.0%} or {LEAST_ALLOWED / 1e9} GB either way",
                    step.status == 0 and abs(step.peak - expected) <= allowed)


def fits_or_refuses(step, advice):
    """That training either does as it says or is refused for lack of memory, with what would make it smaller."""
    return trains(step) if step.status == 0 else refuses(step, "GB of memory", advice, "--ignore_memory")


def ask(url, name):
    """Seconds of an answer of `ANSWER` tokens."""
    started = time.monotonic()
    body = {"model": name, "messages": [{"role": "user", "content": "生抽与老抽的区别？"}], "max_tokens": ANSWER, "temperature": 0}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        json.load(answer)
    return time.monotonic() - started


def serves(path):
    """`Step` of the server with its defaults: a lone answer, `STREAMS` at once, Ctrl-C."""
    words = [sys.executable, str(ROOT / "tools" / "serve.py"), "--load_checkpoint", str(path), "--port", "0", "--model_name", "walk"]
    started, lines, url = time.monotonic(), [], None
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)
    for line in process.stdout:
        lines.append(line)
        found = re.search(r"at (http://\S+?)/ ", line)
        if found:
            url = found[1]
            break
    alone = together = stopping = float("inf")
    if url:
        ask(url, "walk")  # what is made at the first request
        alone = ask(url, "walk")
        with concurrent.futures.ThreadPoolExecutor(STREAMS) as clients:
            together = max(clients.map(lambda _: ask(url, "walk"), range(STREAMS)))
        stopping = time.monotonic()
        process.send_signal(signal.SIGINT)
    lines += process.stdout
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    stopping = time.monotonic() - stopping
    step = Step("serve", process.returncode, time.monotonic() - started, usage.ru_maxrss * 1024, "".join(lines))
    print(f"serve: status {step.status}, {step.seconds:.0f} s, {step.peak / 1e9:.2f} GB", flush=True)
    return promised(step, f"{ANSWER} tokens alone {alone:.1f} s, in each of {STREAMS} streams {together:.1f} s: a lone one waits "
                          f"for no idle place; ends {stopping:.1f} s after Ctrl-C, {STOPPED_WITHIN} at most",
                    step.status == 0 and alone < together and stopping <= STOPPED_WITHIN)


def write_checkpoint(directory, fields):
    """Random bfloat16 weights under the published 12B's names, in shards with an index, a config and the tokenizer."""
    import torch

    from telechat.checkpoint.layout import official_parameters
    from telechat.config import TeleChatConfig

    values = {**fields, "hidden_dropout": 0.0, "attention_dropout": 0.0, "layer_norm_epsilon": 1e-5, "pad_token_id": 3,
              "tie_word_embeddings": False, "training_seqlen": fields["seq_length"], "model_type": "telechat"}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "generation_config.json").write_text(json.dumps({"max_length": fields["seq_length"], "do_sample": False}))
    shutil.copy(TOKENIZER, directory)
    torch.manual_seed(0)
    shards, size = [{}], 0
    tensors = official_parameters(TeleChatConfig.from_pretrained(str(directory)))
    for tensor in tensors:
        weight = torch.ones(tensor.shape) if len(tensor.shape) == 1 else torch.randn(tensor.shape) * 0.02
        shards[-1][tensor.name] = weight.to(torch.bfloat16)
        size += weight.numel() * 2
        if size > 5e8:
            shards, size = [*_saved(directory, shards), {}], 0
    names, shards = {}, [*_saved(directory, shards)]
    for number, held in enumerate(shards, 1):
        file = f"pytorch_model_{number:05d}-of-{len(shards):05d}.bin"
        os.rename(held.path, directory / file)
        names.update(dict.fromkeys(held.names, file))
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return sum(math.prod(tensor.shape) for tensor in tensors)


@dataclasses.dataclass
class Shard:
    """A file that has been written."""

    path: pathlib.Path
    names: list


def _saved(directory, shards):
    """The shards as files: those still in memory are written, so that one at a time is held."""
    import torch

    done = []
    for number, shard in enumerate(shards):
        if isinstance(shard, dict):
            path = directory / f"shard-{number}"
            torch.save(shard, path)
            shard = Shard(path, list(shard))
        done.append(shard)
    return done


def write_benchmark(directory):
    """A C-Eval directory of one subject: five worked examples and eight questions."""
    for split, count in (("dev", 5), ("val", 8)):
        (directory / split).mkdir(parents=True)
        lines = ["id,question,A,B,C,D,answer"] + [f"{n},{n} + 1 等于几？,{n},{n + 1},{n + 2},{n + 3},B" for n in range(count)]
        (directory / split / f"logic_{split}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def walk(folder, fields):
    """The steps of the walk, each as it ends."""
    torch_path, path, data = folder / "torch", folder / "model", folder / "data"
    # In a process of its own: the peak of a child process counts from what its parent holds.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as writer:
        parameters = writer.submit(write_checkpoint, torch_path, fields).result()
    print(f"{parameters:,} parameters, {parameters * 2 / 1e9:.2f} GB in bfloat16", flush=True)
    write_benchmark(folder / "ceval")
    step = run("convert", "convert.py", "torch-to-ms", "--torch_path", torch_path, "--mindspore_path", path)
    yield promised(step, "one shard at a time", step.status == 0 and step.peak < 4e9)
    step = run("inspect --statistics", "inspect.py", path, "--statistics")
    yield promised(step, "every tensor finite", step.status == 0 and "NOT FINITE" not in step.output)
    question = ["--predict_data", "<_user>生抽与老抽的区别？<_bot>", "--max_new_tokens", 8]
    for dtype in ("float32", "bfloat16"):
        step = run(f"generate, {dtype}", "generate.py", "--load_checkpoint", path, *question, "--dtype", dtype)
        yield promised(step, "an answer", step.status == 0)
    yield refuses(run("generate --max_length 2000000000", "generate.py", "--load_checkpoint", path, "--max_length", 2_000_000_000,
                      "--predict_data", "你好"), "--max_length", "GB of memory")
    step = run("evaluate ceval", "evaluate.py", "--load_checkpoint", path, "--task", "ceval", "--data", folder / "ceval",
               "--output_dir", folder / "scores")
    yield promised(step, "a score", step.status == 0 and "mean over subjects" in step.output)
    yield refuses(run("serve --cache_memory 900GB", "serve.py", "--load_checkpoint", path, "--port", 0, "--cache_memory", "900GB"),
                  "--cache_memory", "GB")
    yield serves(path)
    step = run("preprocess", "preprocess.py", "--input_dataset_file", ROOT / "samples/conversations.jsonl:4", "--output_path",
               data, "--vocab_file_path", path, "--max_length", 512 if fields is REAL else 128)
    yield promised(step, "a dataset", step.status == 0)
    config = folder / "run.yaml"
    config.write_text("batch_size: 1\ntotal_steps: 2\nsave_steps: 0\nkeep_checkpoints: 1\n")
    for recompute, advice in (("false", "parallel.recompute=true"), ("true", "--max_length")):
        output = folder / f"output-{recompute}"
        yield fits_or_refuses(run(f"train, recompute {recompute}", "train.py", "--config", config, "--train_dataset", data,
                                  "--load_checkpoint", path, "--output_dir", output, "--no-report",
                                  f"parallel.recompute={recompute}"), advice)
        shutil.rmtree(output, ignore_errors=True)
    adapter = folder / "lora.yaml"
    adapter.write_text(config.read_text() + "lora: {rank: 16, alpha: 32}\n")
    yield trains(run("train, LoRA", "train.py", "--config", adapter, "--train_dataset", data, "--load_checkpoint", path,
                     "--output_dir", folder / "output-lora", "--no-report"))
    yield refuses(run("train, batch_size 1000000", "train.py", "--config", config, "--train_dataset", data, "--load_checkpoint",
                      path, "--output_dir", folder / "output", "batch_size=1000000"), "GB of memory", "batch_size")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="a directory that does not exist yet; removed at the end")
    parser.add_argument("--small", action="store_true", help="a model of 5 million parameters, to see that all works")
    arguments = parser.parse_args()
    folder = pathlib.Path(arguments.folder)
    folder.mkdir(parents=True)
    try:
        steps = list(walk(folder, SMALL if arguments.small else REAL))
    finally:
        shutil.rmtree(folder)
    print("\n| step | outcome | time | peak | promise | |\n|---|---|---|---|---|---|")
    print("\n".join(step.line() for step in steps))
    return int(not all(step.kept for step in steps))


if __name__ == "__main__":
    sys.exit(main())
