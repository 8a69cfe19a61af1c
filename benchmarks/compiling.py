"""How long the first training step takes, compilation included, as the model gets deeper."""

from benchmarks import measure
from benchmarks.report import Row, Section

LAYERS = (4, 32)


def run(workspace):
    """S's width with few and with many layers; `Section`."""
    shallow, deep = (2, 4) if workspace.quick else LAYERS
    batches, _ = workspace.batches("S", 4, 256, count=4)
    seconds, steps = {}, {}
    for layers in (shallow, deep):
        keywords = dict(weights=workspace.weights("S", layers), batches=batches, steps=3)
        rounds = [measure.run_child("training", "ours", keywords) for _ in range(workspace.rounds)]
        seconds[layers], steps[layers] = (measure.median(rounds, name) for name in ("first_step", "seconds"))
    row = Row(f"compile and first training step, {deep} layers of S's width, 4 × 256", "s", seconds[deep],
              limit=3 * seconds[shallow], limit_text=f"3 × that of {shallow} layers, {seconds[shallow]:.1f} s")
    return Section([row], notes=[
        f"A later step takes {steps[shallow]:.2f} s with {shallow} layers and {steps[deep]:.2f} s with {deep}."])
