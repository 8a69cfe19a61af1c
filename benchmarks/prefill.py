"""Time from a prompt to its first token, with the graphs compiled."""

from benchmarks import measure
from benchmarks.report import Row, Section
from benchmarks.workspace import prompts

PROMPT = 512


def run(workspace):
    """S and M; `Section`."""
    rows = []
    for size in ("S",) if workspace.quick else ("S", "M"):
        keywords = dict(weights=workspace.weights(size), prompts=prompts(size, 1, PROMPT), new_tokens=1,
                        calls=5 if workspace.quick else 15)
        results = measure.side_by_side("decoding", ["ours", "official", "best"], keywords, workspace.rounds)
        for side, rounds in results.items():
            measure.check_equal(f"{size}, first token, ours against {side}", results["ours"][0]["tokens"],
                                rounds[0]["tokens"])
        rows.append(Row(f"prefill, {PROMPT} tokens, {size}", "ms", goal_official=0.80, goal_best=0.95,
                        **{side: 1e3 * measure.median(rounds, "prompt") for side, rounds in results.items()}))
    return Section(rows)
