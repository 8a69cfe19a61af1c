"""The documentation: the flags of its commands are right, its links lead somewhere, both languages say the same.

That its commands run as well is seen by tests/test_documented_commands.py, in make test-docs.
"""

import argparse
import contextlib
import io
import math
import re
import shlex

import pytest

from telechat.checkpoint.layout import parameter_shapes
from telechat.config import TeleChatConfig
from telechat.training.run_config import RunConfig
from tests.conftest import ROOT, load_tool

PAGES = [ROOT / "README.md", ROOT / "README_zh.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAIRS = [(ROOT / "README.md", ROOT / "README_zh.md"),
         *((path, ROOT / "docs" / "zh" / path.name) for path in sorted((ROOT / "docs").glob("*.md"))
           if path.name not in ("index.md", "api.md"))]


def commands(path):
    """The commands of a page's ```bash blocks, comments left out."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = " ".join(shlex.quote(word) if "$" not in word else word for word in shlex.split(line, comments=True))
            if words:
                found.append(words)
    return found


class Parsed(Exception):
    """The flags were right."""


def tool_commands():
    for page in PAGES:
        for command in commands(page):
            words = [word.replace("$size", "12b").replace("$length", "1024") for word in shlex.split(command)]
            tools = [place for place, word in enumerate(words) if re.fullmatch(r"tools/\w+\.py", word)]
            if tools:
                yield pytest.param(words[tools[0]][6:-3], words[tools[0] + 1:],
                                   id=f"{page.relative_to(ROOT)}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("tool, arguments", tool_commands())
def test_the_flags_of_every_command_are_right(tool, arguments, monkeypatch):
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def parse(self, *args, original=original, **kwargs):
            original(self, *args, **kwargs)  # ends the program where a flag is wrong
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)
    with pytest.raises(Parsed):
        load_tool(tool).main(arguments)


def meshes():
    """(processes, arguments of tools/train.py) of every command that trains in several processes."""
    for page in PAGES:
        for command in commands(page):
            found = re.match(r"(?:python tools/launch\.py -n|msrun --worker_num) (\d+) .*tools/train\.py (.*)", command)
            if found:
                yield pytest.param(found[1], found[2].split(), id=f"{page.relative_to(ROOT)}: {found[1]}")


@pytest.mark.parametrize("processes, arguments", meshes())
def test_the_mesh_of_every_command_fits_its_model_and_batch(processes, arguments, capsys):
    """Those that make test-docs scales down: what they say in full size is possible for the published sizes."""
    overrides = [argument for argument in arguments if "=" in argument]
    if not any(override.startswith("parallel.data") for override in overrides):
        named = [int(size) for size in re.findall(r"parallel\.(?:tensor|pipeline)=(\d+)", " ".join(overrides))]
        overrides.append(f"parallel.data={int(processes) // math.prod(named)}")
    config = ROOT / arguments[arguments.index("--config") + 1]
    assert load_tool("estimate").main(["--config", str(config), "--cards", processes, *overrides]) in (0, None)
    assert f"{processes} card(s)" in capsys.readouterr().out


@pytest.mark.parametrize("column, size, cards, settings", [
    (1, "7b", "8", ["shard_optimizer=true", "micro_batches=1"]),
    (2, "12b", "8", ["tensor=2", "shard_optimizer=true", "micro_batches=1"]),
    (3, "52b", "16", ["tensor=8", "pipeline=2", "sequence_parallel=true", "recompute=true"]),
])
def test_the_readmes_table_is_what_the_estimate_says(column, size, cards, settings, capsys):
    config = ROOT / "configs" / f"finetune_{size}.yaml"
    load_tool("estimate").main(["--config", str(config), "--cards", cards, *(f"parallel.{item}" for item in settings)])
    said = capsys.readouterr().out
    table = {row[0].split(" ")[0]: row[column] for row in rows((ROOT / "README.md").read_text(encoding="utf-8"))}
    # Where the peak is the update's, activations are not among its parts, but among those of other settings.
    kept = ", ".join(f"with{'' if f'{item}=true' in settings else 'out'} {item}" for item in
                     ("recompute", "sequence_parallel"))
    for name, words in (("weights", "weights"), ("gradients", "gradients"), ("optimizer", "optimizer"),
                        ("activations", kept)):
        gigabytes = re.search(rf"^ +([\d.]+) GB  {words}\b", said, re.MULTILINE)[1]
        assert table[name] == f"{float(gigabytes):.1f} GB", name
    assert table["peak"] == f"{expected_peak(said):.1f} GB"
    assert table["tokens/s"] == re.search(r"predicted +([\d,]+) tokens/s", said)[1]


@pytest.mark.parametrize("row", re.findall(r"^\| TeleChat[-23].*$", (ROOT / "README.md").read_text(encoding="utf-8"),
                                           re.MULTILINE), ids=lambda row: row.split("`")[1])
def test_every_model_fits_its_mesh(row, capsys):
    _, size, parameters, weights, cards, mesh, peak = [cell.strip() for cell in row.strip("|").split("|")]
    settings = [f"parallel.{name}={number}" for name, number in re.findall(r"(tensor|data|pipeline) (\d+)", mesh)]
    settings += [f"micro_batches={re.search('micro_batches ([0-9]+)', mesh)[1]}",
                 *(f"parallel.{key}={str(words in mesh).lower()}" for key, words in (
                     ("shard_optimizer", "sharded"), ("sequence_parallel", "sequence parallel"), ("recompute", "recompute")))]
    config = ROOT / "configs" / f"finetune_{size.strip('`')}.yaml"
    load_tool("estimate").main(["--config", str(config), "--cards", cards, *settings])
    said = capsys.readouterr().out
    assert f"{expected_peak(said):.1f} GB" == peak
    assert float(peak.split()[0]) < 64
    model = TeleChatConfig.from_dict(RunConfig.load(config).published_model)
    count = sum(map(math.prod, parameter_shapes(model).values()))
    assert f"{count:,}" == parameters and f"{2 * count / 1e9:.1f} GB" == weights


# Rows of README's table of one card in their order: what is done there, and with how many bits.
ONE_CARD = {"full": None, "lora": None, "lora8": 8, "lora4": 4, "gen": None, "gen8": 8, "gen4": 4}
LORA_52B = ["lora={rank: 16}", "batch_size=8", "micro_batches=8", "sequence_length=1024", "parallel.tensor=1",
            "parallel.pipeline=1", "parallel.recompute=true"]


def one_card(what, size):
    """A cell of that table, by tools/estimate.py."""
    bits = [] if ONE_CARD[what] is None else ["--bits", str(ONE_CARD[what]), "--group_size", "64" if size == "52b" else "128"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        if what.startswith("gen"):
            config = ROOT.parent / "shared/data" / f"telechat_{size}.config.json"
            load_tool("estimate").main(["--generation", "--model_config", str(config), "--batch_size", "8", "--max_length", "2048",
                                        *bits])
        else:
            lora = what != "full" and size != "52b"
            config = ROOT / "configs" / f"{'lora' if lora else 'finetune'}_{size}.yaml"
            load_tool("estimate").main(["--device", "ascend", "--config", str(config), *bits,
                                        *(LORA_52B if what != "full" and size == "52b" else [])])
    peak = float(re.search(r"^memory +about ([\d,.]+) GB", said.getvalue(), re.MULTILINE)[1].replace(",", ""))
    return f"{peak:,.1f} GB" if peak < 100 else f"{peak:,.0f} GB"


@pytest.mark.parametrize("page, start", [("README.md", "| for one card, in 16 bits"), ("README_zh.md", "| 单卡，16 位")])
def test_the_table_of_one_card_is_what_the_estimate_says(page, start, shared):
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = text[text.index(start):].split("\n\n")[0].splitlines()[2:]
    assert len(lines) == len(ONE_CARD)
    for what, line in zip(ONE_CARD, lines):
        assert [cell.strip() for cell in line.strip("|").split("|")[1:]] == [one_card(what, size) for size in ("7b", "12b", "52b")], what


def expected_peak(said):
    return float(re.search(r"about ([\d,.]+) GB expected at the peak", said)[1].replace(",", ""))


def rows(text):
    """The cells of each row of the table of estimates."""
    table = text[text.index("| estimated for a card"):].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.mark.parametrize("english, chinese", PAIRS, ids=[pair[0].name for pair in PAIRS])
def test_both_languages_hold_the_same_commands_and_tables(english, chinese):
    assert commands(english) == commands(chinese)
    texts = [path.read_text(encoding="utf-8") for path in (english, chinese)]
    assert len({text.count("\n|") for text in texts}) == 1, "tables have as many rows"
    assert len({len(re.findall(r"^#+ ", text, re.MULTILINE)) for text in texts}) == 1, "as many headings"
    # Round figures from ten thousand on are written with 万 in Chinese.
    figures = [sorted({figure for figure in re.findall(r"\d+(?:[.,]\d+)+(?! million)", text)
                       if not figure.endswith("0,000")}) for text in texts]
    assert figures[0] == figures[1], "the same figures"


def anchors(path):
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
