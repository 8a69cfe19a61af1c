"""Peak memory of a rank that loads its part of a checkpoint: python benchmarks/rank_loading.py

Writes a checkpoint of more than 2 GB, loads it in 4 tensor-parallel processes under msrun, and compares the
peak resident memory of each with the goal: its share, one full tensor and 300 MB over a process that has
only imported and initialised the same. Ends with status 1 where a rank needs more.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import peak_memory  # noqa: E402

RANKS = 4
ALLOWANCE = 300e6
# 555M parameters in float32: 2.2 GB; its largest tensor is the embedding, 197 MB.
MODEL = dict(vocab_size=24000, hidden_size=2048, n_layer=10, n_head=16, ffn_hidden_size=5504,
             tie_word_embeddings=False)


def make_checkpoint(folder):
    """Random numbers in the layout of the model; returns its size and that of its largest tensor, in bytes."""
    import numpy as np

    from telechat.checkpoint.layout import parameter_shapes
    from telechat.checkpoint.writer import write_checkpoint
    from telechat.config import TeleChatConfig

    config = TeleChatConfig.from_dict(MODEL)
    shapes = parameter_shapes(config)
    random = np.random.default_rng(0)
    write_checkpoint(folder, config,
                     ((name, random.standard_normal(shape, np.float32)) for name, shape in shapes.items()))
    sizes = [4 * int(np.prod(shape)) for shape in shapes.values()]
    return sum(sizes), max(sizes)


def load(folder, output):
    """In a worker: note the peak before and after loading."""
    from telechat.parallel.inference import load_tensor_parallel
    from telechat.parallel.mesh import Mesh
    from telechat.parallel.parallel_config import ParallelConfig

    parallel = ParallelConfig(tensor=RANKS)
    mesh = Mesh.create(parallel)
    empty = peak_memory()
    model = load_tensor_parallel(folder, "float32", mesh, parallel)
    share = sum(parameter.nbytes for block in model.transformer.h for parameter in block.get_parameters())
    share += sum(weight.nbytes for weight in (model.ln_f.weight, model.head_weight, model._embedding))
    result = {"empty": empty, "peak": peak_memory(), "share": share}
    (pathlib.Path(output) / f"rank-{mesh.rank}.json").write_text(json.dumps(result))


def main():
    if len(sys.argv) == 3:
        load(*sys.argv[1:])
        return 0
    folder = tempfile.mkdtemp(prefix="rank-loading-")
    try:
        checkpoint = os.path.join(folder, "checkpoint")
        size, largest = make_checkpoint(checkpoint)
        print(f"checkpoint {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB, {RANKS} tensor-parallel ranks")
        # msrun starts `python` from PATH.
        path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        subprocess.run([sys.executable, str(ROOT / "tools/launch.py"), "-n", str(RANKS), "--log_dir", f"{folder}/logs",
                        __file__, checkpoint, folder], check=True, env={**os.environ, "PATH": path})
        worst = 0.0
        for rank in range(RANKS):
            found = json.loads((pathlib.Path(folder) / f"rank-{rank}.json").read_text())
            more, goal = found["peak"] - found["empty"], found["share"] + largest + ALLOWANCE
            worst = max(worst, more / goal)
            print(f"rank {rank}: share {found['share'] / 1e6:.0f} MB, empty process {found['empty'] / 1e6:.0f} MB, "
                  f"loading took {more / 1e6:.0f} MB more at its peak, allowed {goal / 1e6:.0f} MB")
        return int(worst > 1)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
