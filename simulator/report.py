"""What a program asked of the simulated card, from its log (SIM_LOG): kernels, copies, synchronisations, memory.

    python simulator/report.py LOG        for each training step or generated token, in the steady state, and a layer of it

A training step ends with its last AdamW; a token ends with the copy to the host that follows its last PagedAttention or,
on a plain cache, its last ScatterUpdate. A layer's forward is what is launched from one attention to the next (from one
Softmax where no attention is fused), its backward from one attention's gradient to the next (or one SwiGLU's). The first
steps compile and are left out.
"""

import collections
import statistics
import sys
from dataclasses import dataclass, field

WARM_UP = 2  # steps or tokens that compile, or are the first to find things compiled
# What a layer launches once, the first that is there.
FORWARD = ("PagedAttention", "FlashAttention", "Softmax")
BACKWARD = ("FlashAttentionScoreGrad", "FlashAttentionUnpaddingScoreGrad", "SwiGluGrad")


@dataclass(frozen=True)
class Event:
    """One line of the log. time is in microseconds; bytes of copies and allocations; stream -1 where there is none."""

    time: int
    kind: str  # launch, copy, allocate, free, synchronize, error
    stream: int
    name: str
    bytes: int
    details: str


@dataclass
class Report:
    """Of one step or token (the median of all in the steady state)."""

    unit: str                                   # "step", "token" or "run"
    count: int                                  # how many were seen in the steady state
    milliseconds: float                         # from one's end to the next's
    update_milliseconds: float                  # of them, from the first AdamW's launch to the last's
    kernels: dict[str, int]                     # launches by name
    layer_forward: dict[str, int]               # of them, a layer's forward by name; empty where no layer is seen
    layer_backward: dict[str, int]
    copies: dict[str, tuple[int, int]]          # by direction: how many, bytes
    synchronisations: int
    peak_bytes: int                             # of the whole run
    errors: list[str] = field(default_factory=list)


def read(path: str) -> list[Event]:
    """The events of a log, in the order in which the host caused them."""
    events = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            fields = line.rstrip("\n").split("\t")
            if len(fields) == 6:  # the last line of a process that was killed may be half
                events.append(Event(int(fields[0]), fields[1], int(fields[2]), fields[3], int(fields[4]), fields[5]))
    return events


def cut(events: list[Event]) -> tuple[str, list[list[Event]]]:
    """("step" | "token" | "run", the events of each)."""
    units: list[list[Event]] = []
    if any("AdamW" in event.name for event in events):
        ends = [i for i, event in enumerate(events) if "AdamW" in event.name]
        # An update is followed by more of them; the step's last is followed by the next step's forward.
        last = [i for i, after in zip(ends, [*ends[1:], None]) if after is None or _has_attention(events[i:after])]
        begin = 0
        for end in last:
            units.append(events[begin:end + 1])
            begin = end + 1
        return "step", units
    cached = next((name for name in ("PagedAttention", "ScatterUpdate") if any(name in event.name for event in events)), None)
    if cached:
        begin, attended = 0, False
        for i, event in enumerate(events):
            attended = attended or cached in event.name
            if attended and event.kind == "copy" and event.name == "device to host":
                units.append(events[begin:i + 1])
                begin, attended = i + 1, False
        return "token", units
    return "run", [events]


def _has_attention(events: list[Event]) -> bool:
    return any("CrossEntropyLoss" in event.name or "RmsNorm" in event.name for event in events)


def layer(events: list[Event], anchor: str, without: str) -> dict[str, int]:
    """Launches by name from one anchor to the next, the most usual ones; a stretch that holds `without` is no layer."""
    anchors = [i for i, event in enumerate(events) if event.kind == "launch" and _is(event.name, anchor)]
    stretches = []
    for begin, end in zip(anchors, anchors[1:]):
        stretch = [event.name for event in events[begin:end] if event.kind == "launch"]
        if not any(without in name for name in stretch):
            stretches.append(tuple(sorted(collections.Counter(stretch).items())))
    return dict(collections.Counter(stretches).most_common(1)[0][0]) if stretches else {}


def _is(name: str, anchor: str) -> bool:
    name = name.removeprefix("aclnn").removeprefix("Internal")
    return name.startswith(anchor) and name.endswith("Grad") == anchor.endswith("Grad")


def report(events: list[Event]) -> Report:
    """The median step or token after the warm-up; the whole run where there is neither."""
    unit, units = cut(events)
    steady = units[WARM_UP:] or units[-1:]
    middle = _median_unit(steady)
    copies = {}
    for direction in ("host to device", "device to host", "device to device"):
        found = [event.bytes for event in middle if event.kind == "copy" and event.name == direction]
        copies[direction] = (len(found), sum(found))
    used = peak = 0
    for event in events:
        used += event.bytes * {"allocate": 1, "free": -1}.get(event.kind, 0)
        peak = max(peak, used)
    ends = [u[-1].time for u in units if u]
    gaps = [b - a for a, b in zip(ends[WARM_UP - 1:], ends[WARM_UP:])]
    updates = [event.time for event in middle if "AdamW" in event.name]
    forward, backward = (next((name for name in names if any(_is(event.name, name) for event in middle)), names[0])
                         for names in (FORWARD, BACKWARD))
    return Report(
        unit=unit, count=len(steady), milliseconds=statistics.median(gaps) / 1000 if gaps else 0.0,
        update_milliseconds=(updates[-1] - updates[0]) / 1000 if updates else 0.0,
        kernels=dict(collections.Counter(event.name for event in middle if event.kind == "launch").most_common()),
        layer_forward=layer(middle, forward, "Grad"), layer_backward=layer(middle, backward, "CrossEntropyLoss"),
        copies=copies, synchronisations=sum(event.kind == "synchronize" for event in middle), peak_bytes=peak,
        errors=[event.details for event in events if event.kind == "error"])


def _median_unit(units: list[list[Event]]) -> list[Event]:
    by_size = sorted(units, key=lambda unit: sum(event.kind == "launch" for event in unit))
    return by_size[len(by_size) // 2] if by_size else []


def text(result: Report) -> str:
    def kinds(counts: dict[str, int]) -> str:
        return f"{sum(counts.values())}: " + ", ".join(f"{n} {name}" for name, n in counts.items())

    lines = [f"{result.count} {result.unit}s, of each" if result.unit != "run" else "the whole run",
             f"host time        {result.milliseconds:.1f} ms" +
             (f", {result.update_milliseconds:.1f} of them the update" if result.update_milliseconds else ""),
             f"kernels          {kinds(result.kernels)}"]
    if result.layer_forward:
        lines.append(f"a layer forward  {kinds(result.layer_forward)}")
    if result.layer_backward:
        lines.append(f"a layer backward {kinds(result.layer_backward)}")
    for direction, (count, size) in result.copies.items():
        lines.append(f"{direction:16} {count} copies, {size:,} bytes")
    lines.append(f"synchronisations {result.synchronisations}")
    lines.append(f"peak memory      {result.peak_bytes / 2**20:,.0f} MB, of the run")
    lines += [f"error            {error}" for error in result.errors]
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python simulator/report.py LOG")
    try:
        events = read(sys.argv[1])
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")
    if not events:
        sys.exit(f"report.py: {sys.argv[1]} holds no events: was the process run with SIM_LOG={sys.argv[1]}?")
    print(text(report(events)))


if __name__ == "__main__":
    main()
