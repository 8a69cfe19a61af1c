"""``report.html``: how a run went, in one file that needs nothing else."""

import html
import itertools
import math
import os

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 200, 70, 24
MOST_POINTS = 1000
_STYLE = """:root { color-scheme: light dark; --line: #8886; --a: #1565c0; --b: #d84315; }
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; max-width: 60rem; margin: 1rem auto; padding: 0 1rem; }
svg { max-width: 100%; height: auto; } text { font: 11px system-ui, sans-serif; fill: currentColor; }
table { border-collapse: collapse; width: 100%; } td, th { border: 1px solid var(--line);
padding: .3rem .5rem; text-align: left; vertical-align: top; } pre { overflow-x: auto; border: 1px solid var(--line); padding: .6rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1rem; } figure { margin: 0; }"""


def write_report(path, records, total_steps, config, answers, held_out):
    """Write the page, whole or not at all.

    Args:
        path (str): of the file.
        records (list of dict): the lines of ``metrics.jsonl``.
        total_steps (int): of the run.
        config (str): the resolved configuration as YAML.
        answers (list of dict): {"step", "question", "answer"}, in the order of steps.
        held_out (bool): whether the questions were held out of training.
    """
    with open(path + ".partial", "w", encoding="utf-8") as file:
        file.write(page(records, total_steps, config, answers, held_out))
    os.replace(path + ".partial", path)


def page(records, total_steps, config, answers, held_out):
    """The HTML; arguments as `write_report`."""
    steps = [record for record in records if "loss" in record]
    evaluations = [(record["step"], record["evaluation_loss"]) for record in records if "evaluation_loss" in record]
    done = steps[-1]["step"] if steps else 0
    skipped = [record["step"] for record in steps if record["skipped"]]
    speeds = [(record["step"], record["tokens"] / max(record["seconds"], 1e-9)) for record in steps]
    so_far = list(zip((record["step"] for record in steps), itertools.accumulate(record["skipped"] for record in steps)))
    charts = [
        chart("loss", "cross entropy a token", [("training", _curve(steps, "loss")), ("evaluation", evaluations)]),
        chart("learning rate", "", [("learning rate", _curve(steps, "learning_rate"))]),
        chart("gradient norm", "before clipping", [("gradient norm", _curve(steps, "grad_norm"))]),
        chart("speed", "tokens a second", [("tokens/s", speeds)]),
        chart("skipped steps", "so far", [("skipped", so_far)]),
    ]
    notes = [f"step {done:,} of {total_steps:,}", f"{sum(record['tokens'] for record in steps):,} tokens"]
    if evaluations:
        best = min(evaluations, key=lambda point: point[1])
        notes.append(f"evaluation loss {evaluations[-1][1]:.4f}, best {best[1]:.4f} at step {best[0]:,}")
    notes.append(f"{len(skipped)} steps skipped" + (f" (the last at {skipped[-1]:,})" if skipped else ""))
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>step {done}/{total_steps}</title><style>{_STYLE}</style></head><body>",
        "<h1>Training</h1>", f"<p>{html.escape('; '.join(notes))}</p>",
        f'<div class="charts">{"".join(charts)}</div>',
        _answers(answers, held_out), "<h2>Configuration</h2>", f"<pre>{html.escape(config)}</pre>", "</body></html>", ""])


def _curve(records, name):
    """(step, value) of the steps; what is not finite leaves a gap."""
    return [(record["step"], record[name]) for record in records]


def thin(points):
    """At most about `MOST_POINTS` of them: the mean of neighbours, in equal groups."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[first:first + size] for first in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    thinned = []
    for group in groups:
        finite = [value for _, value in group if math.isfinite(value)]
        thinned.append((group[len(group) // 2][0], sum(finite) / len(finite) if finite else math.nan))
    return thinned


def chart(title, unit, curves):
    """A figure with an SVG drawing: curves are (name, [(step, value), …])."""
    curves = [(name, thin(points)) for name, points in curves if points]
    values = [value for _, points in curves for _, value in points if math.isfinite(value)]
    steps = [step for _, points in curves for step, _ in points]
    caption = f"<figcaption><strong>{html.escape(title)}</strong> {html.escape(unit)}</figcaption>"
    if not values:
        return f"<figure>{caption}<p>nothing yet</p></figure>"
    low, high, first, last = min(values), max(values), min(steps), max(steps)
    if high == low:
        low, high = (low - 0.5 * abs(low), high + 0.5 * abs(high)) if low else (0, 1)

    def place(step, value):
        x = LEFT + (WIDTH - LEFT - 10) * ((step - first) / (last - first) if last > first else 0.5)
        return f"{x:.1f},{10 + (HEIGHT - BOTTOM - 10) * (high - value) / (high - low):.1f}"

    parts = []
    for tick in range(5):
        value = low + (high - low) * tick / 4
        y = place(first, value).split(",")[1]
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - 10}" stroke="var(--line)"/>'
                     f'<text x="{LEFT - 6}" y="{y}" text-anchor="end" dominant-baseline="middle">{value:.4g}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        x = place(step, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step}</text>')
    for number, (name, points) in enumerate(curves):
        colour = ("var(--a)", "var(--b)")[number]
        for stretch in _finite_stretches(points):
            line = " ".join(place(*point) for point in stretch)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if len(points) < 50:
            parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in
                      (place(*point).split(",") for point in points if math.isfinite(point[1]))]
        if len(curves) > 1:
            parts.append(f'<text x="{WIDTH - 14}" y="{22 + 14 * number}" text-anchor="end" '
                         f'style="fill:{colour}">{name}</text>')
    described = f"{title}: from {values[0]:.4g} to {values[-1]:.4g}"
    return (f'<figure>{caption}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(described)}">'
            f'{"".join(parts)}</svg></figure>')


def _finite_stretches(points):
    stretch = []
    for point in [*points, (0, math.nan)]:
        if math.isfinite(point[1]):
            stretch.append(point)
        elif stretch:
            yield stretch
            stretch = []


def _answers(answers, held_out):
    if not answers:
        return ""
    kind = "held out of training"
    if not held_out:
        kind = "of the training data (none are held out: --eval_share of preprocess.py)"
    parts = [f"<h2>Answers</h2><p>Greedy, to questions {kind}.</p>"]
    for question in dict.fromkeys(answer["question"] for answer in answers):
        rows = "".join(f"<tr><td>{answer['step']}</td><td>{html.escape(answer['answer'])}</td></tr>"
                       for answer in answers if answer["question"] == question)
        parts.append(f"<h3>{html.escape(question)}</h3><table><tr><th>step</th><th>answer</th></tr>{rows}</table>")
    return "".join(parts)
