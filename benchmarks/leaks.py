"""A long run: resident memory must stay flat and graphs must not be compiled again and again."""

from benchmarks import measure
from benchmarks.report import Row, Section
from benchmarks.workspace import SIZES, read_batches

LENGTHS = (256, 320, 384, 512)  # of the training sequences, in turn
STEPS, TOKENS = 500, 5000
MAX_LENGTH, LONGEST_PROMPT = 256, 160
FLAT = 1.02
# Graphs of a model that has seen all of these lengths.
MOST_COMPILATIONS = {"training": 40, "generating": 20}


def train(weights, files, steps):
    """In a child: ``steps`` steps, the files' batches in turn; memory and compilations after each tenth step."""
    import telechat

    batches = [batch for group in zip(*map(read_batches, files)) for batch in group]
    trainer = telechat.Trainer(telechat.TeleChat.from_pretrained(weights),
                               telechat.TrainConfig(learning_rate=1e-5, lr_schedule="constant"))
    samples = []
    for number in range(1, steps + 1):
        trainer.train_step(*batches[number % len(batches)])
        if number % 10 == 0:
            samples.append((number, measure.resident_memory(), _compilations()))
    return {"samples": samples}


def generate(weights, tokens):
    """In a child: prompts and answers of changing lengths until ``tokens`` are generated; samples as in `train`."""
    import numpy as np

    import telechat

    model = telechat.TeleChat.from_pretrained(weights)
    generator = telechat.Generator(model, MAX_LENGTH)
    random = np.random.default_rng(0)
    # Short and long ones of all lengths first, so that every graph that is ever needed is there after warm-up.
    sizes = [(length, new) for length in range(8, LONGEST_PROMPT, 24) for new in (8, MAX_LENGTH - LONGEST_PROMPT)]
    done, samples = 0, []
    while done < tokens:
        length, new = sizes.pop() if sizes else random.integers(1, (LONGEST_PROMPT, MAX_LENGTH - LONGEST_PROMPT))
        prompt = random.integers(4, SIZES["S"]["vocab_size"], length).tolist()
        done += len(generator.generate([prompt], telechat.SamplingParams(int(new)))[0])
        samples.append((done, measure.resident_memory(), _compilations()))
    return {"samples": samples}


def _compilations():
    """How many graphs MindSpore has compiled in this process."""
    from mindspore.graph.api import ms_compile_cache

    return len(ms_compile_cache)


def run(workspace):
    """`Section`."""
    steps, tokens = (40, 200) if workspace.quick else (STEPS, TOKENS)
    files = [workspace.batches("S", 1, length, count=4)[0] for length in LENGTHS]
    runs = {
        "training": ("training steps", measure.run_child(
            "leaks", "train", dict(weights=workspace.weights("S", 2), files=files, steps=steps))),
        "generating": ("generated tokens", measure.run_child(
            "leaks", "generate", dict(weights=workspace.weights("S"), tokens=tokens))),
    }
    rows, notes, points = [], [], {}
    for name, (unit, figures) in runs.items():
        samples = figures["samples"]
        end = samples[-1][0]
        warm = next(sample for sample in samples if sample[0] >= end / 5)
        later = [sample for sample in samples if sample[0] > warm[0]]
        largest = max(memory for _, memory, _ in later) / warm[1]
        rows.append(Row(f"{name}: most memory over that after warm-up", "×", largest, limit=FLAT,
                        limit_text=f"flat within {FLAT - 1:.0%}"))
        rows.append(Row(f"{name}: graphs compiled", "", samples[-1][2], limit=MOST_COMPILATIONS[name],
                        limit_text="stated"))
        notes.append(f"{name}: {end:,} {unit} of changing lengths; after warm-up (the first fifth) "
                     f"{warm[1] / 1e6:,.0f} MB and {warm[2]} graphs, at the end {samples[-1][1] / 1e6:,.0f} MB.")
        points[name] = {"ours": [(number, memory) for number, memory, _ in samples]}
    return Section(rows, notes=notes, points=points)
