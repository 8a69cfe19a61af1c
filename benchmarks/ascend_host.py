"""What the host takes to launch a token and a training step on a card, without one: python benchmarks/ascend_host.py

The real tools run on the simulated card (simulator/README.md) with operators that do nothing, 64 wide and in bfloat16:
what is left is the time of Python and of MindSpore's run time. Kernels, copies and synchronisations come from the same
log. In the end, what a graph of as many kernels takes by itself (ascend_floor.py). Needs `make simulator`; takes some two
minutes.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from simulator.environment import environment  # noqa: E402
from simulator.report import Report, read, report  # noqa: E402

DECODE_LAYERS, TRAIN_LAYERS = 30, 8
TOKENS, STEPS = 100, 12
SHAPE = dict(vocab_size=1664, hidden_size=64, n_head=4, ffn_hidden_size=128, training_seqlen=8192)


# Nothing is learnt where operators do nothing, so the trainer's look at its first updates would stop it.
TOOL = """
import runpy, sys
from telechat.training.update_check import UpdateCheck
UpdateCheck.finish = lambda *arguments: None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(folder: pathlib.Path, tool: str, *arguments: object) -> Report:
    """The report of a tool's run with operators that do nothing. SystemExit with the tool's last words if it fails."""
    log = folder / "log"
    command = [sys.executable, "-c", TOOL, str(ROOT / "tools" / tool), *map(str, arguments)]
    settings = environment(SIM_OPERATORS="none", SIM_LOG=str(log))
    settings["PYTHONPATH"] = f"{ROOT}:{settings['PYTHONPATH']}"
    result = subprocess.run(command, env=settings, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    if result.returncode:
        sys.exit(f"{tool} failed:\n{result.stderr[-1000:]}")
    return report(read(str(log)))


def on_cpu(folder: pathlib.Path, code: str) -> None:
    """Runs Python in a process of its own: this one must not choose MindSpore's device."""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def decode(folder: pathlib.Path, batch: int) -> Report:
    """A token of each of `batch` sequences."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"input": f"<_user>{i}<_bot>"}) + "\n" for i in range(batch)), encoding="utf-8")
    return run(folder, "generate.py", "--load_checkpoint", folder / "model", "--input_file", prompts, "--independent",
               "--batch_size", batch, "--max_new_tokens", TOKENS, "--dtype", "bfloat16")


def train(folder: pathlib.Path) -> Report:
    """A step of 2 sequences of 160 tokens."""
    run_config = dict(model=SHAPE | dict(n_layer=TRAIN_LAYERS, tie_word_embeddings=False), sequence_length=160,
                      batch_size=2, total_steps=STEPS, dtype="bfloat16", learning_rate=1e-3, warmup_steps=1, seed=1)
    (folder / "run.yaml").write_text(json.dumps(run_config), encoding="utf-8")  # JSON is YAML
    subprocess.run([sys.executable, str(ROOT / "tools" / "preprocess.py"), "--input_dataset_file",
                    str(ROOT / "samples" / "conversations.jsonl"), "--output_path", str(folder / "data"),
                    "--vocab_file_path", str(ROOT / "samples" / "tokenizer.model"), "--max_length", "160"],
                   check=True, capture_output=True)
    return run(folder, "train.py", "--config", folder / "run.yaml",
               "--train_dataset", folder / "data", "--output_dir", folder / "run",
               f"tokenizer={ROOT / 'samples' / 'tokenizer.model'}")


def line(name: str, found: Report, layers: int) -> str:
    copies, size = found.copies["host to device"]
    return (f"| {name} | {found.milliseconds:.1f} | {found.milliseconds / layers:.2f} | {sum(found.layer_forward.values())} "
            f"| {sum(found.kernels.values())} | {copies} ({size} bytes) | {found.synchronisations} |")


def main() -> None:
    print("| | ms | ms a layer | kernels, a layer forward | kernels | host to device | synchronisations |\n"
          "|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        on_cpu(folder, "from tests.conftest import save_small_model; "
                       f"save_small_model({str(folder / 'model')!r}, n_layer={DECODE_LAYERS}, **{SHAPE!r})")
        for batch in (1, 8):
            print(line(f"a token, {DECODE_LAYERS} layers, batch {batch}", decode(folder, batch), DECODE_LAYERS), flush=True)
        found = train(folder)
        print(line(f"a training step, {TRAIN_LAYERS} layers", found, TRAIN_LAYERS))
        print(f"the update: {found.update_milliseconds:.1f} ms of the step's {found.milliseconds:.1f}\n", flush=True)
        settings = environment(SIM_OPERATORS="none", MS_DEV_HOST_BLOCKING_RUN="1")  # as telechat sets it
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / "ascend_floor.py")], env=settings, cwd=folder,
                       check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
