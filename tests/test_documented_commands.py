"""Every command and every piece of Python of the documentation runs, on tiny models in the published layouts.

The commands are read from the Markdown and run as they stand, in the order of the page, but for this:

- several processes are scaled down to what two cores can bear (`scaled`);
- quantising has groups of 16 inputs, which divide those of the tiny models;
- servers take a free port, are looked at and stopped;
- what one command wrote is removed where another one writes to the same place (the page's alternatives);
- what two pages have word for word runs once;
- `make demo` is the recipe of the Makefile with two steps of training instead of 320.

What changes the installation (pip, source, the other targets of make) is not run: CI does that.
"""

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

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.checkpoint.test_mindformers import to_mindformers
from tests.conftest import ROOT
from tests.distributed.job import free_port
from tests.test_documentation import commands

NOT_RUN = ("make ", "pip ", "source ")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("data.md", "serving.md", "quantization.md", "ascend.md"))]
# As published but for the sizes, and with the tokenizer of the samples, whose control tokens are the 12B's.
SIZES = dict(vocab_size=1664, hidden_size=32, n_layer=2, n_head=8, ffn_hidden_size=64)
MODELS = {"7b": dict(training_seqlen=2048, tie_word_embeddings=True, rotary_ntk_context=4096),
          "12b": dict(training_seqlen=1024),
          "52b": dict(training_seqlen=4096, style="gpt2", use_bias=False, rotary_float16=False, rotary_ntk_context=4096,
                      rotary_ntk_scales_theta=True)}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder like the project's root in which the published files lie where the README puts them."""
    import mindspore
    import torch

    from telechat import TeleChat, TeleChatConfig
    from telechat.checkpoint.convert import ms_to_torch

    folder = tmp_path_factory.mktemp("documentation")
    for name in ("tools", "telechat", "configs", "samples"):
        (folder / name).symlink_to(ROOT / name)
    for size, fields in MODELS.items():
        TeleChat(TeleChatConfig(**SIZES, **fields)).save_pretrained(folder / "ours")
        shutil.copy(ROOT / "samples" / "tokenizer.model", folder / "ours")
        (folder / "ours" / "generation_config.json").write_text(json.dumps({"max_length": 128, "do_sample": False}))
        ms_to_torch(str(folder / "ours"), str(folder / f"telechat-{size}-torch"))
        make_adapter(folder / f"adapter-{size}", TeleChatConfig.from_pretrained(folder / "ours"))
        shutil.rmtree(folder / "ours")
    for name in ("law", "poems"):
        (folder / f"adapter-{name}").symlink_to(folder / "adapter-12b")
    quantise(folder / "telechat-12b-torch", folder / "telechat-12b-int4")
    published = folder / "telechat-52b-torch"
    state = {name: tensor for file in published.glob("*.bin") for name, tensor in torch.load(file).items()}
    arrays = to_mindformers(json.loads((published / "config.json").read_text()), state, mp=8)
    mindspore.save_checkpoint([{"name": name, "data": mindspore.Tensor(array)} for name, array in arrays.items()],
                              str(folder / "telechat_52b.ckpt"))
    lines = (ROOT / "samples" / "conversations.jsonl").read_text(encoding="utf-8")
    (folder / "multi_turn_example.jsonl").write_text(lines, encoding="utf-8")
    (folder / "input.json").write_text('{"input": "你好"}\n{"input": "再见"}\n', encoding="utf-8")
    for name, header in (("ceval-exam", "id,question,A,B,C,D,answer\n"), ("mmlu", "")):
        for split in ("dev", "val", "test"):
            (folder / name / split).mkdir(parents=True)
            rows = "".join(f"{f'{number},' if header else ''}1 + {number}?,1,2,3,4,A\n" for number in range(5))
            (folder / name / split / f"logic_{split}.csv").write_text(header + rows)
    return folder


def make_adapter(folder, config):
    """A LoRA adapter of rank 2, as the peft package saves one, for a model like ``config``."""
    from telechat.checkpoint.layout import official_parameters

    tensors = {}
    for stored in official_parameters(config):
        if stored.name.endswith(("query.weight", "c_attn.weight")):
            outputs, inputs = stored.shape[::-1] if config.style == "gpt2" else stored.shape
            module = "base_model.model.transformer." + stored.name.removesuffix(".weight").removeprefix("transformer.")
            tensors[f"{module}.lora_A.weight"] = np.full((2, inputs), 0.01, np.float32)
            tensors[f"{module}.lora_B.weight"] = np.full((outputs, 2), 0.01, np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))


def quantise(source, target):
    """A published directory with its products in AutoGPTQ's form, 4 bits, one group."""
    import torch

    shutil.copytree(source, target)
    state = {name: tensor for file in target.glob("*.bin") for name, tensor in torch.load(file).items()}
    for file in target.glob("pytorch_model*"):
        file.unlink()
    for name in [name for name in state if name.endswith("proj.weight") or name.endswith(("query.weight", "dense.weight",
                                                                                       "key_value.weight"))]:
        weight = state.pop(name).float().numpy().T  # (in, out)
        scales = np.abs(weight).max(0, keepdims=True) / 7
        values = (np.clip(np.round(weight / scales), -7, 7) + 8).astype(np.uint32).reshape(-1, 8, weight.shape[1])
        words = sum(values[:, place] << np.uint32(4 * place) for place in range(8)).astype(np.uint32)
        module = name.removesuffix(".weight")
        state[f"{module}.qweight"] = torch.from_numpy(words.view(np.int32))
        state[f"{module}.qzeros"] = torch.full((1, weight.shape[1] // 8), 0x77777777, dtype=torch.int32)
        state[f"{module}.scales"] = torch.from_numpy(scales).half()
    torch.save(state, target / "gptq_model-4bit-128g.bin")
    (target / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128}))


def scaled(command):
    """The command for two cores, once for each node.

    Each number of a mesh (tensor, pipeline, data) becomes 2; there are as many processes as the mesh has
    places, or 2 where the command names no mesh. Nodes are all this machine.
    """
    mesh = r"(parallel\.(?:tensor|pipeline|data))=\d+"
    processes = 2 ** len(re.findall(mesh, command))
    nodes = int((re.search(r"--nodes (\d+)", command) or "11")[1])
    for pattern, value in ((mesh, r"\1=2"), (r"(-n|--worker_num) \d+", rf"\1 {max(processes, 2)}"),
                           (r"(--local_worker_num) \d+", rf"\1 {max(processes, 2) // nodes}"),
                           (r"(--master) [\d.]+:\d+", rf"\1 127.0.0.1:{free_port()} --cluster_time_out 300"),
                           (r"^(msrun)", rf"\1 --master_port {free_port()}")):
        command = re.sub(pattern, value, command)
    return [command.replace("--node_rank 0", f"--node_rank {node}") for node in range(nodes)]


def test_how_commands_are_scaled():
    def spelled(command):
        return [re.sub(r"(127.0.0.1:|port )\d+", r"\1PORT", one) for one in scaled(command)]

    assert spelled("python tools/launch.py -n 16 --nodes 2 --node_rank 0 --master 10.0.0.1:8118 tools/train.py "
                   "parallel.tensor=8 parallel.pipeline=2") == [
        f"python tools/launch.py -n 4 --nodes 2 --node_rank {node} --master 127.0.0.1:PORT --cluster_time_out 300 "
        "tools/train.py parallel.tensor=2 parallel.pipeline=2" for node in (0, 1)]
    assert spelled("python tools/launch.py -n 8 tools/train.py batch_size=8") == [
        "python tools/launch.py -n 2 tools/train.py batch_size=8"]
    assert spelled("msrun --worker_num 8 --local_worker_num 8 --join=True tools/train.py parallel.tensor=4 parallel.data=2") == [
        "msrun --master_port PORT --worker_num 4 --local_worker_num 4 --join=True tools/train.py parallel.tensor=2 "
        "parallel.data=2"]


def demo_commands():
    """What `make demo` runs, and what it offers at its end."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ").replace("$(BIN)/", "")
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1].splitlines()
    run = [re.sub(r"(tools/train.py .*)", r"\1 total_steps=2 save_steps=2", line.strip()) for line in recipe
           if not line.startswith("\t@echo")]
    offered = [re.search(r"python tools/[^\"]*", line)[0] for line in recipe if "tools/" in line and "@echo" in line]
    assert [command.split()[1] for command in offered] == ["tools/generate.py", "tools/serve.py"]
    return [*run, *offered]


def written(command):
    """The directory that a command makes, or None."""
    flag = "mindspore_path" if "-to-ms" in command else "torch_path" if "ms-to-torch" in command else "output_(?:dir|path)"
    found = re.search(rf"--{flag} (\S+)", command)
    return found and found[1]


def run(command, folder, code=None):
    """Run a command, a server with the Python ``code`` as its client; returns a `CompletedProcess`."""
    environment = {**os.environ, "MS_NODE_TIMEOUT": "60",
                   "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"}
    if "tools/serve.py" in command:
        return run_server(command, folder, environment, code)
    if command.startswith("python tools/quantize.py "):
        command += " --group_size 16"
    several = command.startswith(("msrun ", "python tools/launch.py "))
    processes = [subprocess.Popen(["bash", "-c", one], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                 for one in (scaled(command) if several else [command])]
    output = "".join(process.communicate(timeout=900)[0] for process in processes)
    return subprocess.CompletedProcess(command, max(abs(process.returncode) for process in processes), output)


def run_server(command, folder, environment, code):
    """Start a server, look at its page, ask it what the page's Python asks, and stop it."""
    command, = scaled(command) if command.startswith("python tools/launch.py ") else [command]
    process = subprocess.Popen(["bash", "-c", f"exec {re.sub(' --port [0-9]+', '', command)} --port 0"], cwd=folder,
                               env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = next((found[1] for found in (re.search(r"at (http://\S+)/ ", line) for line in process.stdout) if found),
                   None)
        if url:
            assert b"TeleChat" in urllib.request.urlopen(url).read()
            if code:
                model = re.search(r"--load_checkpoint (\S+)", command)[1]
                code = code.replace("http://127.0.0.1:8000", url).replace("telechat-12b", model)
                asked = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True,
                                       text=True, timeout=900)
                assert asked.returncode == 0, asked.stderr
            process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, output)


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def steps(page):
    """The commands of a page as they are run, variables filled in."""
    text = page.read_text(encoding="utf-8")
    sizes = re.findall(r"size=(\w+); length=(\d+)", text)
    # The way back to torch stands beside the way here, but takes what is trained further below.
    for command in sorted(commands(page), key=lambda command: "ms-to-torch" in command):
        if command == "make demo":
            yield from demo_commands()
        elif not command.startswith((*NOT_RUN, "size=", "'size=")):
            # "The commands are the same for all three models", and run for all three up to serving.
            each = sizes if re.search("torch-to-ms|tools/(?:preprocess|train|generate|serve).py", command) else sizes[:1]
            for size, length in each if "$size" in command else [("", "")]:
                yield command.replace("$size", size).replace("$length", length)


@pytest.fixture(scope="module")
def ran():
    """The commands that have been run."""
    return set()


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_runs(page, workspace, ran):
    """The Chinese pages have the same commands. The README's come first: the others start from what they make."""
    if page.name != "README.md" and not (workspace / "telechat-12b").exists():
        pytest.skip("the README's commands make what this page starts from")
    clients = [code for code in python_blocks(page) if "127.0.0.1:8000" in code]
    for command in steps(page):
        if command in ran:
            continue
        ran.add(command)
        begin = time.monotonic()
        if written(command):
            shutil.rmtree(workspace / written(command), ignore_errors=True)
        result = run(command, workspace, *clients)
        assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}"
        print(f"{time.monotonic() - begin:5.1f} s  {command}")
    for code in python_blocks(page):
        if code not in clients:
            result = run(f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}", workspace)
            assert result.returncode == 0, f"{code}\n{result.stdout[-4000:]}"
