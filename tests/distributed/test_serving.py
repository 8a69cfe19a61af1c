"""tools/serve.py on two tensor-parallel processes."""

import json

from telechat import Generator, SamplingParams, TeleChat, Tokenizer
from tests.conftest import save_small_model
from tests.distributed.job import free_port


def test_two_processes_serve_as_one(msrun, tmp_path):
    """More requests than slots, greedy and sampled: the library's answers on one process; SIGTERM ends both."""
    checkpoint = tmp_path / "tiny"
    save_small_model(checkpoint, training_seqlen=128)
    prompts = [[20, 300 + number, 400, 21] for number in range(5)]
    requests = [{"model": "tiny", "prompt": prompt, "max_tokens": 6 + 3 * number, "seed": number,
                 "temperature": float(number % 2)} for number, prompt in enumerate(prompts)]
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    job = msrun(2, "serve.py", checkpoint, free_port(), tmp_path / "requests.json", tmp_path / "answers.json", timeout=200,
                environment={"MS_NODE_TIMEOUT": "30"})
    assert "chat with 'tiny' at http" in job.logs[0] and "\nstopped\n" in job.logs[0]
    assert "chat with" not in job.logs[1]
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    generator = Generator(TeleChat.from_pretrained(checkpoint), 128)
    answers = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    for request, answer in zip(requests, answers):
        params = SamplingParams(request["max_tokens"], request["temperature"], stop_ids=(2,), seed=request["seed"])
        expected = tokenizer.decode(generator.generate([request["prompt"]], params)[0], skip_control_tokens=True)
        assert answer["choices"][0]["text"] == expected
