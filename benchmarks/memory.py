"""Peak resident memory of training steps on CPU, against the estimate: python benchmarks/memory.py

Each configuration trains a model with random weights for three steps, in processes of its own under
msrun where it asks for several. Both figures hold what a process takes without a model (MindSpore and its
compiler). Ends with status 1 where an estimate is off by more than 15 %.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TOLERANCE = 0.15
STEPS = 3
EMPTY = {"model": dict(vocab_size=64, hidden_size=32, n_layer=1, n_head=2, ffn_hidden_size=64),
         "sequence_length": 16, "batch_size": 1}
SMALL = dict(vocab_size=8000, hidden_size=512, n_layer=6, n_head=8, ffn_hidden_size=1408,
             tie_word_embeddings=False)
MIDDLE = dict(vocab_size=40000, hidden_size=768, n_layer=12, n_head=12, ffn_hidden_size=2048, tie_word_embeddings=False)
CONFIGURATIONS = {
    "0.15B": {"model": MIDDLE, "sequence_length": 512, "batch_size": 4},
    "0.15B, bfloat16": {"model": MIDDLE, "sequence_length": 512, "batch_size": 4, "dtype": "bfloat16"},
    "0.15B, recompute, 2 micro-batches": {"model": MIDDLE, "sequence_length": 512, "batch_size": 4, "micro_batches": 2,
                                          "parallel": {"recompute": True}},
    "0.45B": {
        "model": {**MIDDLE, "vocab_size": 70000, "hidden_size": 1024, "n_layer": 24, "n_head": 16, "ffn_hidden_size": 2816},
        "sequence_length": 512, "batch_size": 2},
    "12B architecture, activations kept": {
        "model": SMALL, "sequence_length": 256, "batch_size": 4},
    "52B architecture, recompute, gradients of 4 micro-batches": {
        "model": {**SMALL, "use_bias": False}, "sequence_length": 256, "batch_size": 8, "micro_batches": 4,
        "parallel": {"recompute": True}},
    "7B architecture, bfloat16, dropout": {
        "model": {**SMALL, "tie_word_embeddings": True, "attention_dropout": 0.1, "hidden_dropout": 0.1},
        "sequence_length": 128, "batch_size": 4, "dtype": "bfloat16"},
    "12B architecture, attention in pieces": {
        "model": SMALL, "sequence_length": 2048, "batch_size": 1},
    "12B architecture, an adapter of rank 16": {"model": SMALL, "sequence_length": 512, "batch_size": 4, "lora": {"rank": 16}},
    "12B architecture, an adapter of rank 16, dropout, bfloat16": {
        "model": SMALL, "sequence_length": 512, "batch_size": 4, "dtype": "bfloat16", "lora": {"rank": 16, "dropout": 0.05}},
}


def train(configuration):
    """In the child: take the steps, return this process's peak and what was expected, in bytes."""
    import numpy as np

    from benchmarks.measure import peak_memory
    from telechat.adapters.trained import TrainedAdapter, read_initial
    from telechat.config import TeleChatConfig
    from telechat.parallel.mesh import Mesh
    from telechat.parallel.stage import build_stage, read_random
    from telechat.training.memory import fullest_rank
    from telechat.training.run_config import RunConfig
    from telechat.training.trainer import Trainer

    values = dict(configuration)
    model = TeleChatConfig.from_dict(values.pop("model"))
    config = RunConfig.from_dict(values)
    mesh = Mesh.create(config.parallel)
    parallel = dataclasses.replace(config.parallel, data=mesh.data.size)
    stage = build_stage(model, config.train.dtype, mesh, parallel, read_random(model, 0))
    adapter = None
    if config.lora is not None:
        adapter = TrainedAdapter(model, config.lora, stage.layers, read_initial(model, config.lora, 0), mesh.tensor)
    trainer = Trainer(stage, config.train, parallel, mesh, adapter)
    shape = (config.batch_size, config.sequence_length + 1)
    ids = np.random.default_rng(0).integers(4, model.vocab_size, shape).astype(np.int32)
    for _ in range(STEPS):
        trainer.train_step(ids, ids)
    return mesh.rank, {"peak": peak_memory(), "expected": fullest_rank(model, config, config.sequence_length).peak}


def measure(configuration):
    """The fullest process's peak, and what is expected of the fullest, in bytes."""
    parallel = configuration.get("parallel", {})
    processes = parallel.get("tensor", 1) * parallel.get("pipeline", 1) * parallel.get("data", 1)
    with tempfile.TemporaryDirectory() as folder:
        command = [__file__, "--child", json.dumps(configuration), folder]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command = ["-m", "mindspore.parallel.cluster.run", f"--worker_num={processes}", "--join=True",
                       f"--local_worker_num={processes}", f"--master_port={port}", f"--log_dir={folder}/log",
                       *command]
        # msrun starts `python` from PATH.
        path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, cwd=folder,
                       env={**os.environ, "PATH": path, "GLOG_v": "3"})
        results = [json.loads(file.read_text()) for file in pathlib.Path(folder).glob("rank-*.json")]
    return max(result["peak"] for result in results), results[0]["expected"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, metavar=("CONFIGURATION", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        rank, result = train(json.loads(arguments.child[0]))
        (pathlib.Path(arguments.child[1]) / f"rank-{rank}.json").write_text(json.dumps(result))
        return 0
    print(f"without a model: {measure(EMPTY)[0] / 1e6:.0f} MB")
    worst = 0.0
    for name, configuration in CONFIGURATIONS.items():
        peak, expected = measure(configuration)
        error = expected / peak - 1
        worst = max(worst, abs(error))
        print(f"{name}: measured {peak / 1e6:.0f} MB, expected {expected / 1e6:.0f} MB, {error:+.1%}",
              flush=True)
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
