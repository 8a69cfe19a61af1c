"""The documentation: its commands parse and, in make test-docs, run; its links lead somewhere; both languages say the same."""

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "README_zh.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAIRS = [(ROOT / "README.md", ROOT / "README_zh.md"),
         *((path, ROOT / "docs" / "zh" / path.name) for path in sorted((ROOT / "docs").glob("*.md"))
           if path.name not in ("index.md", "api.md"))]
# What CI does anyhow, what would change this installation, what needs a file of MindFormers, and what needs several
# processes, up to 16 on two machines: tests/distributed runs the like; of all of these the flags are checked here.
NOT_RUN = ("make ", "pip install", "python tools/convert.py mindformers-to-ms", "python tools/launch.py", "msrun ",
           "python tools/estimate.py")


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
    spec = importlib.util.spec_from_file_location(f"{tool}_tool", ROOT / "tools" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(Parsed):
        module.main(arguments)


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


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder like the project's root in which the published files of a tiny 12B lie where the README puts them."""
    from telechat import TeleChat, TeleChatConfig
    from telechat.checkpoint.convert import ms_to_torch

    folder = tmp_path_factory.mktemp("documentation")
    for name in ("tools", "telechat", "configs", "samples"):
        (folder / name).symlink_to(ROOT / name)
    # As the 12B, and the tokenizer of the samples, whose control tokens are the 12B's.
    TeleChat(TeleChatConfig(vocab_size=1664, hidden_size=32, n_layer=4, n_head=4, ffn_hidden_size=64,
                            training_seqlen=1024)).save_pretrained(folder / "ours")
    shutil.copy(ROOT / "samples" / "tokenizer.model", folder / "ours")
    (folder / "ours" / "generation_config.json").write_text(json.dumps({"max_length": 128, "do_sample": False}))
    ms_to_torch(str(folder / "ours"), str(folder / "telechat-12b-torch"))
    lines = (ROOT / "samples" / "conversations.jsonl").read_text(encoding="utf-8")
    (folder / "multi_turn_example.jsonl").write_text(lines, encoding="utf-8")
    (folder / "input.json").write_text('{"input": "你好"}\n{"input": "再见"}\n', encoding="utf-8")
    for name, header in (("ceval-exam", "id,question,A,B,C,D,answer\n"), ("mmlu", "")):
        for split in ("dev", "val", "test"):
            (folder / name / split).mkdir(parents=True)
            rows = "".join(f"{f'{number},' if header else ''}1 + {number}?,1,2,3,4,A\n" for number in range(5))
            (folder / name / split / f"logic_{split}.csv").write_text(header + rows)
    return folder


def run(command, folder, variables):
    environment = {**os.environ, **variables, "MS_NODE_TIMEOUT": "60",
                   "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"}
    if "tools/serve.py" in command:
        return run_server(command, folder, environment)
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=900)


def run_server(command, folder, environment):
    """Start a server, look at its page, and stop it."""
    process = subprocess.Popen(["bash", "-c", f"exec {command.replace('--port 8000', '--port 0')}"], cwd=folder, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    url = next((found[1] for found in (re.search(r"at (http://\S+)/ ", line) for line in process.stdout) if found), None)
    if url:
        assert b"TeleChat" in urllib.request.urlopen(url).read()
        process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    return subprocess.CompletedProcess(command, process.returncode, output, output)


@pytest.mark.docs
@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "data.md", ROOT / "docs" / "serving.md"],
                         ids=lambda page: page.name)
def test_every_command_runs(page, workspace):
    """In the order of the page; the Chinese pages have the same commands. The README's come first."""
    if page.name != "README.md" and not (workspace / "telechat-12b").exists():
        pytest.skip("the README's commands make what this page starts from")
    variables = {}
    # The way back to torch stands beside the way here, but takes what is trained further below.
    for command in sorted(commands(page), key=lambda command: "ms-to-torch" in command):
        if re.match(r"'?size=", command):
            variables.update(re.findall(r"(\w+)=(\w+)", command))
        elif not command.startswith(NOT_RUN):
            begin = time.monotonic()
            result = run(command, workspace, variables)
            assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
            print(f"{time.monotonic() - begin:5.1f} s  {command}")
