"""What the tests of tools/train.py under msrun share."""

from tests.conftest import ROOT

TRAIN = ROOT / "tools/train.py"
SAMPLES = ROOT / "samples"
SMALL = ["model.hidden_size=32", "model.n_layer=2", "model.n_head=4", "model.ffn_hidden_size=48", "batch_size=4",
         "warmup_steps=2", "model.hidden_dropout=0.1", f"tokenizer={SAMPLES / 'tokenizer.model'}"]
DEADLINE = 60  # seconds: "all end, non-zero, within a minute"


def arguments(dataset, output, *more):
    return ["--config", ROOT / "configs/demo.yaml", "--train_dataset", dataset, "--output_dir", output, *SMALL, *more]


def refused(job, *words):
    """The job failed within a minute; exactly one process says one sentence with these words."""
    assert job.exit_code != 0 and job.seconds < DEADLINE
    said = [line for log in job.logs for line in log.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, said
    assert all(str(word) in said[0] for word in words), said[0]
    assert not any("Traceback" in log for log in job.logs)
