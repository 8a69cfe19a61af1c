"""Train on meshes of one process count and write what each step reported, and a checkpoint afterwards.

trace.py CASES.json: a list of {"checkpoint", "batches", "train", "parallel", "output"} and, where
wanted, {"resume": true, "stop_after": N, "evaluate": true}; {"lora": {…}} trains a new adapter; {"lost": true} loses
updates and writes what is said of it.
"""

import json
import os
import sys

import numpy as np
from mindspore import Tensor, ops

from telechat.adapters.lora_config import LoraConfig
from telechat.adapters.peft import open_checkpoint
from telechat.adapters.trained import TrainedAdapter, read_initial
from telechat.checkpoint.layout import parameter_shapes
from telechat.parallel.mesh import Mesh
from telechat.parallel.parallel_config import ParallelConfig
from telechat.parallel.plan import check_mesh
from telechat.parallel.stage import build_stage
from telechat.training.train_config import TrainConfig
from telechat.training.trainer import Trainer
from telechat.training.training_state import list_checkpoints, restore, save_training_checkpoint
from telechat.training.update_check import UpdateLost


def lose_updates(optimizer):
    """From now on AdamW is given copies, as a card's graph makes them of what is in host memory."""
    update = optimizer._update
    optimizer._update = lambda *given, copies: update(*(ops.deepcopy(x) if isinstance(x, Tensor) else x for x in given))


def run(case):
    parallel, train = ParallelConfig(**case["parallel"]), TrainConfig(**case["train"])
    mesh = Mesh.create(parallel)
    reader, _ = open_checkpoint(case["checkpoint"])
    config = reader.config
    check_mesh(config, parallel)
    reader.check(parameter_shapes(config))
    stage, adapter = build_stage(config, train.dtype, mesh, parallel, reader.read), None
    if "lora" in case:
        lora = LoraConfig(**case["lora"])
        adapter = TrainedAdapter(config, lora, stage.layers, read_initial(config, lora, train.seed), mesh.tensor)
    trainer = Trainer(stage, train, parallel, mesh, adapter)
    if case.get("resume"):
        restore(list_checkpoints(case["output"])[-1], trainer, {})
    batches = np.load(case["batches"])
    if case.get("lost"):
        lose_updates(trainer.optimizer)
        os.makedirs(case["output"], exist_ok=True)
        try:
            trainer.train_step(batches["ids"][trainer.step], batches["labels"][trainer.step])
        except UpdateLost as error:
            with open(os.path.join(case["output"], f"lost-rank-{mesh.rank}.json"), "w") as file:
                json.dump(str(error), file)
        return
    last = case.get("stop_after", len(batches["ids"]))
    results = []
    while trainer.step < last:
        result = trainer.train_step(batches["ids"][trainer.step], batches["labels"][trainer.step])
        results.append([result.loss, result.grad_norm, result.learning_rate])
    report = {"steps": results, "place": mesh.describe()}
    if case.get("evaluate"):
        report["evaluation"] = trainer.evaluate([(batches["ids"][0], batches["labels"][0])])
    save_training_checkpoint(case["output"], trainer, {})
    with open(os.path.join(case["output"], f"trace-{last}-rank-{mesh.rank}.json"), "w") as file:
        json.dump(report, file)


with open(sys.argv[1]) as file:
    cases = json.load(file)
for case in cases:
    print("case", case["output"], flush=True)
    run(case)
