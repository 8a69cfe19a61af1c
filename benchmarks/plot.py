"""The plots of benchmarks/README.md."""

import math

COLOURS = {"ours": "tab:red", "official": "tab:blue", "best": "tab:green", "limit": "black"}


def draw_results(sections, file):
    """Ratios as bars with their goals, and the time of a decoded token against the model's size.

    Args:
        sections: list of `report.Section`.
        file: PNG to write.
    """
    figure, (bars, times) = _figure(2, (13, 6), width_ratios=(3, 2))
    ratios = [(row.what, side, ratio, goal) for section in sections for row in section.rows
              for side, ratio, goal in row.ratios()]
    for place, (what, side, ratio, goal) in enumerate(ratios):
        bars.barh(place, ratio, color=COLOURS[side], label=f"ours / {side}" if _first(ratios, place) else None)
        if goal:
            bars.plot([goal, goal], [place - 0.45, place + 0.45], color="black", linewidth=2)
    bars.set_yticks(range(len(ratios)), [what.split(" (")[0] for what, *_ in ratios], fontsize=6)
    bars.invert_yaxis()
    bars.axvline(1, color="grey", linewidth=0.5)
    bars.set_xlabel("ours / theirs, black: the goal (lower is better)")
    if ratios:
        bars.legend(fontsize=7)
    decode = {}
    for section in sections:
        decode.update(section.points.get("decode", {}))
    models = sorted(decode.items(), key=lambda item: item[1]["bytes"])
    for side in COLOURS:
        times.loglog([model["bytes"] / 1e9 for _, model in models], [1e3 * model[side] for _, model in models],
                     linestyle="--" if side == "limit" else "-", marker="o", color=COLOURS[side],
                     label="reading the weights once" if side == "limit" else side)
    for size, model in models:
        times.annotate(size, (model["bytes"] / 1e9, 1e3 * model["limit"]), xytext=(4, -10), textcoords="offset points")
    times.set_xlabel("weights read for a token, GB")
    times.set_ylabel("decoding, ms a token, batch 1")
    times.legend(fontsize=7)
    _save(figure, file)


def draw_growth(section, file):
    """Time and memory against size, a panel a series, log-log.

    Args:
        section: the `report.Section` of growth.
        file: PNG to write.
    """
    columns = 4
    count = max(len(section.points), 1)
    figure, axes = _figure(columns, (16, 3.2 * math.ceil(count / columns)), rows=math.ceil(count / columns))
    for axis in axes.flat[count:]:
        axis.axis("off")
    for axis, (name, sides) in zip(axes.flat, section.points.items()):
        memory = name.endswith("memory")
        for side, pairs in sides.items():
            axis.loglog([size for size, _ in pairs], [value / 1e6 if memory else value for _, value in pairs], "o-",
                        color=COLOURS[side], label=side)
        sizes = sorted({size for pairs in sides.values() for size, _ in pairs})
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.set_xticks([], minor=True)
        axis.set_title(name, fontsize=8)
        axis.set_ylabel("MB" if memory else "s", fontsize=7)
        axis.tick_params(labelsize=6, which="both")
    axes.flat[0].legend(fontsize=7)
    _save(figure, file)


def _first(ratios, place):
    return all(side != ratios[place][1] for _, side, _, _ in ratios[:place])


def _figure(columns, size, rows=1, width_ratios=None):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    grid = {"width_ratios": width_ratios} if width_ratios else None
    return plt.subplots(rows, columns, figsize=size, gridspec_kw=grid, squeeze=rows == 1)


def _save(figure, file):
    figure.tight_layout()
    figure.savefig(file, dpi=90, bbox_inches="tight")  # with labels wider than the margin
