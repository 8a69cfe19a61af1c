"""From figures to tables: a row holds ours beside theirs and the goals."""

import dataclasses
from typing import Optional


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table. Everything measured is in ``unit``; lower is better.

    Attributes:
        what: what was measured.
        unit: "s", "ms", "MB", …
        ours, official, best: figures; None where a side was not measured.
        goal_official, goal_best: the most that ours / theirs may be; None for no goal.
        limit: the most that ours may be, and ``limit_text`` where it comes from.
    """

    what: str
    unit: str
    ours: float
    official: Optional[float] = None
    best: Optional[float] = None
    goal_official: Optional[float] = None
    goal_best: Optional[float] = None
    limit: Optional[float] = None
    limit_text: str = ""

    def ratios(self):
        """[(side, ours / theirs, goal or None), …] of the sides measured."""
        sides = (("official", self.official, self.goal_official), ("best", self.best, self.goal_best))
        return [(side, self.ours / theirs, goal) for side, theirs, goal in sides if theirs]

    def misses(self):
        """Which goals are not reached, as a list of texts; empty where all are."""
        missed = [f"{ratio:.2f} × {side}" for side, ratio, goal in self.ratios() if goal and ratio > goal]
        return missed + (["the limit"] if self.limit is not None and self.ours > self.limit else [])


@dataclasses.dataclass(frozen=True)
class Section:
    """The outcome of one subject: rows with goals, free tables, and sentences on how it was measured.

    Attributes:
        rows: list of `Row`.
        tables: list of (heading, header, lines), lists of str each, for what has no goal of the form above.
        notes: list of sentences.
        points: {series: {side: [(size, value), …]}} for the plots.
    """

    rows: list = dataclasses.field(default_factory=list)
    tables: list = dataclasses.field(default_factory=list)
    notes: list = dataclasses.field(default_factory=list)
    points: dict = dataclasses.field(default_factory=dict)

    def to_dict(self):
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        """The inverse of `to_dict`."""
        return cls(**{**values, "rows": [Row(**row) for row in values["rows"]]})


HEADER = ["what", "unit", "ours", "official", "best", "ours / official (goal)", "ours / best (goal)", "limit",
          "reached"]


def number(value):
    """Three digits that count, or a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(header, lines):
    """A markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def rows_table(rows):
    """The markdown table of a list of `Row`."""
    lines = []
    for row in rows:
        ratios = {side: f"{ratio:.2f}" + (f" (≤ {goal:.2f})" if goal else "") for side, ratio, goal in row.ratios()}
        limit = "–" if row.limit is None else f"≤ {number(row.limit)}: {row.limit_text}"
        goals = row.goal_official or row.goal_best or row.limit is not None
        reached = ("no: " + ", ".join(row.misses()) if row.misses() else "yes") if goals else "–"
        lines.append([row.what, row.unit, number(row.ours), number(row.official), number(row.best),
                      ratios.get("official", "–"), ratios.get("best", "–"), limit, reached])
    return table(HEADER, lines)


def markdown(section):
    """A section's tables and notes."""
    parts = [rows_table(section.rows)] if section.rows else []
    for heading, header, lines in section.tables:
        parts += [f"**{heading}**", table(header, lines)]
    parts += ["\n".join(f"- {note}" for note in section.notes)] if section.notes else []
    return "\n\n".join(parts)


def replace_between(text, name, content):
    """``text`` with what is between ``<!-- name begin -->`` and ``<!-- name end -->`` replaced.

    Raises:
        ValueError: the markers are not there, once each.
    """
    begin, end = f"<!-- {name} begin -->", f"<!-- {name} end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the markers {begin} and {end} must stand in the text once, in this order")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"
