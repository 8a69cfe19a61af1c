"""tools/serve.py on tensor-parallel processes."""

import json
import re

import pytest

from telechat import Generator, SamplingParams, TeleChat, TeleChatConfig, Tokenizer
from telechat.generation.memory import cache_bytes
from tests.adapter_files import write_adapter
from tests.conftest import save_small_model
from tests.distributed.job import free_port


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.wide)])
def test_processes_serve_as_one(msrun, tmp_path, processes):
    check_serving(msrun, tmp_path, processes, {"MS_NODE_TIMEOUT": "30"})


def check_serving(msrun, tmp_path, processes, environment):
    """More requests than slots, and than the cache has blocks for; greedy and sampled, some to an adapter; prompts in
    parts, and shared.

    The library's answers on one process; SIGTERM ends all. Four blocks of 16 tokens: a process that put back another
    sequence than its neighbours would compute something else, or wait for them for ever.
    """
    checkpoint = tmp_path / "tiny"
    save_small_model(checkpoint, training_seqlen=128)
    write_adapter(tmp_path / "adapter", TeleChatConfig.from_pretrained(checkpoint), 3, size=0.3)
    prompts = [[20, 300 + number // 2, *range(400, 416), 500 + number, 21] for number in range(5)]
    requests = [{"model": "other" if number > 2 else "tiny", "prompt": prompt, "max_tokens": 15 + 5 * number, "seed": number,
                 "temperature": float(number % 2)} for number, prompt in enumerate(prompts)]
    requests[3]["n"] = 2  # two that come at once and both outgrow the cache, however the others come together
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    size = cache_bytes(TeleChatConfig.from_pretrained(checkpoint), 1, 64, 4, processes)
    job = msrun(processes, "serve.py", checkpoint, free_port(), tmp_path / "requests.json", tmp_path / "answers.json",
                "--max_batch", 3, "--max_length", 60, "--cache_memory", f"{size / 1e6}MB", "--prefill_chunk", 8,
                "--lora", f"other={tmp_path / 'adapter'}",
                timeout=300, environment=environment)
    assert "chat with 'tiny' at http" in job.logs[0] and "\nstopped\n" in job.logs[0]
    assert all("chat with" not in log for log in job.logs[1:])
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    generators = {"tiny": Generator(TeleChat.from_pretrained(checkpoint), 128),
                  "other": Generator(TeleChat.from_pretrained(checkpoint, lora=tmp_path / "adapter"), 128)}
    answers, metrics = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    assert int(re.search(r"^telechat_preemptions_total (\d+)$", metrics, re.MULTILINE)[1]) > 0
    assert int(re.search(r"^telechat_prefix_cache_hit_tokens_total (\d+)$", metrics, re.MULTILINE)[1]) >= 16
    assert "\ntelechat_cache_blocks 4\n" in metrics
    for request, answer in zip(requests, answers):
        params = SamplingParams(request["max_tokens"], request["temperature"], stop_ids=(2,), seed=request["seed"])
        alone = generators[request["model"]].generate([request["prompt"]] * request.get("n", 1), params)
        assert [choice["text"] for choice in answer["choices"]] == [tokenizer.decode(ids, skip_control_tokens=True)
                                                                   for ids in alone]
