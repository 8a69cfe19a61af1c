"""tools/estimate.py: what it prints is what the library computes, and bad input is one sentence."""

import dataclasses
import json
import re

import pytest

from telechat import TeleChatConfig
from telechat.checkpoint.layout import parameter_shapes
from telechat.parallel.estimate import activation_bytes, elements
from telechat.parallel.estimate_peak import stage_memory
from telechat.parallel.estimate_speed import step_flops, traffic
from telechat.parallel.parallel_config import ParallelConfig
from telechat.training.memory import fullest_rank, memory_lines, workload_of
from telechat.training.run_config import RunConfig
from tests.conftest import ROOT, assert_refused, load_tool

pytestmark = pytest.mark.wide

CONFIG = ROOT / "configs" / "finetune_52b.yaml"
TENSOR_8_PIPELINE_2 = ["parallel.tensor=8", "parallel.pipeline=2", "batch_size=16", "micro_batches=8"]


@pytest.fixture
def model_file(tmp_path):
    """config.json of a small model in a directory of its own."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(dict(vocab_size=1000, hidden_size=128, n_layer=6, n_head=8,
                                    ffn_hidden_size=384, training_seqlen=4096, tie_word_embeddings=False)))
    return path


def number(text, label):
    """The first number after ``label``."""
    return float(re.search(re.escape(label) + r"[^\d\n]*([\d.,]+(?:e\+\d+)?)", text)[1].replace(",", ""))


def test_published_52b_on_16_cards(shared, tool):
    """The numbers of the library, in the seed's layout."""
    path = shared / "data" / "telechat_52b.config.json"
    settings = [*TENSOR_8_PIPELINE_2, "parallel.sequence_parallel=true", "parallel.recompute=true"]
    result = tool("estimate.py", "--config", CONFIG, "--model_config", path, "--cards", 16, *settings)
    assert result.returncode == 0, result.stderr
    model = TeleChatConfig.from_pretrained(path)
    parallel = ParallelConfig(tensor=8, pipeline=2, data=1, sequence_parallel=True, recompute=True)
    step = workload_of(model, RunConfig.load(CONFIG, settings), 4096)
    memories = [stage_memory(model, parallel, step, stage) for stage in (0, 1)]
    memory = max(memories, key=lambda one: one.peak)
    assert number(result.stdout, "model") == elements(parameter_shapes(model).values())
    assert number(result.stdout, "the fullest:") == memory.parameters
    assert number(result.stdout, "memory      about") == pytest.approx(memory.peak / 1e9, abs=0.005)
    for name, size in memory.parts.items():
        shown = re.search(rf"([\d.]+) GB  {name}\b", result.stdout)
        assert size == 0 if shown is None else float(shown[1]) == pytest.approx(size / 1e9, abs=0.04), name
    for recompute in (False, True):
        for sequence in (False, True):
            other = dataclasses.replace(parallel, sequence_parallel=sequence, recompute=recompute)
            expected = activation_bytes(model, other, step, memories.index(memory))
            label = (f"GB  {'with' if recompute else 'without'} recompute, "
                     f"{'with' if sequence else 'without'} sequence_parallel")
            shown = re.search(r"([\d.]+) " + label, result.stdout)[1]
            assert float(shown) == pytest.approx(expected / 1e9, abs=1e-3)
    stage = int(number(result.stdout, "Communication of a rank in stage"))
    for item in traffic(model, parallel, step, stage):
        line = next(line for line in result.stdout.splitlines()
                    if item.purpose in line and item.operation in line and f" {item.calls:,} " in line)
        assert f"{item.tensor_bytes / 1e9:.3f} GB" in line and f"{item.sent_bytes / 1e9:.3f} GB" in line
    assert number(result.stdout, "FLOPs of a step") == pytest.approx(step_flops(model, step), rel=1e-3)
    assert number(result.stdout, "bubble") == pytest.approx(100 / 9, abs=0.1)
    assert "assumed" in result.stdout and "not measured" in result.stdout and "313 TFLOPS" in result.stdout
    assert "fits into 64 GB" in result.stdout


def test_search_lists_meshes_as_settings_that_the_tool_takes(model_file, tool, monkeypatch):
    monkeypatch.setenv("HCCL_BUFFSIZE", "1")  # MB; of usual buffers there is more than of this model
    base = ["estimate.py", "--config", CONFIG, "--load_checkpoint", model_file.parent, "--cards", 8,
            "sequence_length=256", "batch_size=16"]
    result = tool(*base, "--search", "--card_memory", "400MB")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "parallel.tensor=" in line]
    speeds = [float(line.split()[0].replace(",", "")) for line in lines]
    assert len(lines) > 2 and speeds == sorted(speeds, reverse=True)
    assert all(float(line.split()[1]) <= 0.4 for line in lines)
    again = tool(*base, *lines[0].split()[4:], "--card_memory", "400MB")
    assert again.returncode == 0, again.stderr
    assert "fits into 0.4 GB" in again.stdout
    assert number(again.stdout, "predicted") == speeds[0]


def test_a_mesh_that_is_too_large_for_a_card_says_so(model_file, tool):
    result = tool("estimate.py", "--config", CONFIG, "--model_config", model_file, "--card_memory", "1MB")
    assert result.returncode == 0 and "DOES NOT FIT" in result.stdout and "--search" in result.stdout
    refused = tool("estimate.py", "--config", CONFIG, "--model_config", model_file, "--card_memory", "1MB",
                   "--cards", 4, "--search")
    assert_refused(refused, "4 cards", "0.001 GB", "the least is", "parallel.tensor=")


def test_the_yaml_of_a_model_from_scratch_and_no_cards(tool):
    result = tool("estimate.py", "--config", ROOT / "configs" / "demo.yaml")
    assert result.returncode == 0, result.stderr
    assert "1 card(s)" in result.stdout and "Communication: none" in result.stdout


def test_on_this_machine_the_figure_is_that_of_training_and_its_parts_add_up(tool):
    """The same lines as tools/train.py prints, which the same function makes."""
    config = ROOT / "configs" / "demo.yaml"
    result = tool("estimate.py", "--config", config)
    run = RunConfig.load(config)
    lines = memory_lines(fullest_rank(TeleChatConfig.from_dict(run.model), run, run.sequence_length))
    assert "\n".join(lines) in result.stdout and "on a CPU" in result.stdout and "TFLOPS" not in result.stdout
    parts = [float(size) for size in re.findall(r"^ +([\d.]+) GB  \w", "\n".join(lines), re.MULTILINE)]
    assert len(parts) > 3 and sum(parts) == pytest.approx(number(lines[0], "about"), abs=1e-6)
    card = tool("estimate.py", "--config", config, "--card_memory", "64GB")
    assert "on an Ascend card" in card.stdout and "framework\n" not in card.stdout and "fits into 64 GB" in card.stdout


@pytest.mark.parametrize("change, words", [
    (["--card_memory", "64"], ["--card_memory", "64GB"]),
    (["--card_memory", "0GB"], ["--card_memory"]),
    (["--card_memory", "many GB"], ["--card_memory"]),
    (["--efficiency", "1.5"], ["--efficiency", "1.5"]),
    (["--card_tflops", "0"], ["--card_tflops"]),
    (["--link_gbps", "nan"], ["--link_gbps"]),
    (["--latency_us", "-1"], ["--latency_us"]),
    (["--cards", "0"], ["--cards"]),
    (["--cards", "12", *TENSOR_8_PIPELINE_2], ["12", "16", "tensor 8"]),
    (["--cards", "16", *TENSOR_8_PIPELINE_2, "parallel.data=2"], ["16", "32"]),
    (["parallel.tensor=3"], ["parallel.tensor 3", "n_head 8"]),
    (["parallel.pipeline=7"], ["parallel.pipeline 7", "n_layer 6"]),
    (["parallel.data=16"], ["batch_size", "micro_batches"]),
    (["parallel.tensor=8", "parallel.sequence_parallel=true", "sequence_length=127"],
     ["127", "sequence_parallel"]),
    (["sequence_length=null"], ["sequence_length"]),
    (["sequence_length=5000"], ["5000", "4096"]),
    (["parallel.tensr=2"], ["parallel.tensr", "parallel.tensor"]),
    (["--model_config", "absent.json"], ["absent.json"]),
    (["--config", "absent.yaml"], ["absent.yaml"]),
    (["--bits", "4"], ["products of 4 or 8 bits are not trained themselves; add lora"]),
    (["--bits", "3", "lora={rank: 2}"], ["--bits must be 8 or 4, not 3"]),
    (["--search", "--cards", "7", "batch_size=3", "micro_batches=3"], ["7 cards", "batch_size 3"]),
])
def test_bad_input_is_one_sentence(model_file, tool, change, words):
    arguments = ["--config", CONFIG, "--model_config", model_file]
    assert_refused(tool("estimate.py", *arguments, *change), *words)


def test_answering_on_cards(model_file, capsys):
    from telechat.generation.card_memory import card_memory

    parts = card_memory(TeleChatConfig.from_pretrained(model_file), "float16", 8, 1000, 2)
    load_tool("estimate").main(["--generation", "--model_config", str(model_file), "--batch_size", "8", "--max_length", "1000",
                                "--dtype", "float16", "--cards", "2", "--card_memory", "1MB"])
    said = capsys.readouterr().out
    assert f"memory      about {sum(parts.values()) / 1e9:.2f} GB, 8 sequence(s) of 1,000 tokens in float16 on each of 2" in said
    shown = {name: float(size) for size, name in re.findall(r"^ +([\d.]+) GB  (.+)$", said, re.MULTILINE)}
    assert shown == {name: round(size / 1e9, 2) for name, size in parts.items()} and "DOES NOT FIT into 0.001 GB" in said
    assert said.endswith("the cache may hold 0 tokens: 0 sequence(s) of 1,000\n")
    load_tool("estimate").main(["--generation", "--model_config", str(model_file), "--batch_size", "8", "--max_length", "1000",
                                "--dtype", "float16", "--cards", "2", "--card_memory", "10GB"])
    config = TeleChatConfig.from_pretrained(model_file)
    token = 2 * config.n_layer * config.num_key_value_heads * config.head_dim * 2 // 2
    tokens = int((0.9 * 10 ** 10 - sum(size for name, size in parts.items() if name != "key-value cache")) // token)
    assert f"the cache may hold {tokens:,} tokens: {tokens // 1000:,} sequence(s) of 1,000\n" in capsys.readouterr().out


def test_a_model_must_be_given(tool):
    refused = tool("estimate.py", "--config", CONFIG, "published_model=null")
    assert_refused(refused, "--model_config", "--load_checkpoint")


@pytest.mark.parametrize("size", ["7b", "12b", "52b"])
def test_the_configs_know_their_published_models(size, shared):
    """Their published_model is what the published config.json says, and as many parameters."""
    published = TeleChatConfig.from_pretrained(shared / "data" / f"telechat_{size}.config.json")
    expected = RunConfig.load(ROOT / "configs" / f"finetune_{size}.yaml").published_model
    assert {name: getattr(published, name) for name in expected} == expected
    assert parameter_shapes(TeleChatConfig.from_dict(expected)) == parameter_shapes(published)


@pytest.mark.parametrize("device", ["ascend", "cpu"])
def test_quantised_products_in_answering(model_file, tmp_path, capsys, device):
    """--bits is what a directory says that tools/quantize.py has written; weights are what a process then holds."""
    from telechat.generation.memory import weight_bytes

    values = {**json.loads(model_file.read_text()), "quantization_config": dict(quant_method="gptq", bits=4, group_size=32)}
    (tmp_path / "config.json").write_text(json.dumps(values))
    said = []
    for arguments in (["--model_config", str(model_file), "--bits", "4", "--group_size", "32"], ["--model_config", str(tmp_path / "config.json")]):
        load_tool("estimate").main(["--generation", "--device", device, "--max_length", "100", *arguments])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    model = TeleChatConfig.from_pretrained(tmp_path / "config.json", quantised=True)
    expected = weight_bytes(model, 2, scale=2 if device == "ascend" else 4)
    assert float(re.search(r"([\d.]+) GB  weights", said[0])[1]) == pytest.approx(expected / 1e9, abs=0.005)
