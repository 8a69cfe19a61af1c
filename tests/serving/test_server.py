"""The running server through OpenAI's own client: answers are those of the library, alone or in company."""

import concurrent.futures
import signal
import time

import numpy as np
import openai
import psutil
import pytest

from telechat.generation import chat
from telechat.generation.sampling import SamplingParams
from tests.serving.conftest import start

STOP = (2,)  # <_end> of the shipped tokenizer


def ask(client, text="你好", **fields):
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], **fields)


def alone(generator, tokenizer, prompt, count=1, **params):
    """The library's ``count`` answers to one prompt, as texts."""
    params = SamplingParams(**{"max_new_tokens": 24, "stop_ids": STOP, **params})
    return [tokenizer.decode(ids, skip_control_tokens=True) for ids in generator.generate([prompt] * count, params)]


def question(tokenizer, text="你好", history=()):
    return chat.build_prompt(tokenizer, list(history), text, 900, honour_leading_marker=False)


def metric(client, name):
    text = client._client.get(str(client.base_url).replace("/v1/", "/metrics"),
                              headers={"authorization": f"Bearer {client.api_key}"}).text
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name + " "))


def wait_until(holds, seconds=30):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])


def test_a_chat_in_one_piece_and_streamed(client, generator, tokenizer):
    expected, = alone(generator, tokenizer, question(tokenizer))
    whole = ask(client, max_tokens=24)
    assert whole.choices[0].message.content == expected and whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length" and whole.object == "chat.completion"
    length = len(question(tokenizer))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (length, 24, length + 24)
    chunks = list(ask(client, max_completion_tokens=24, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 10
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []


def test_a_second_turn_uses_the_first(client, generator, tokenizer):
    history = [{"role": "user", "content": "生抽"}, {"role": "bot", "content": "酱油"}]
    expected, = alone(generator, tokenizer, question(tokenizer, "老抽", history))
    answer = client.chat.completions.create(model="tiny", max_tokens=24, messages=[
        {"role": "user", "content": "生抽"}, {"role": "assistant", "content": "酱油"},
        {"role": "user", "content": [{"type": "text", "text": "老"}, {"type": "text", "text": "抽"}]}])
    assert answer.choices[0].message.content == expected


def test_sampling_fields_reach_the_sampler(client, generator, tokenizer):
    fields = dict(temperature=1.2, top_p=0.9, seed=5, presence_penalty=0.7, frequency_penalty=-0.5)
    expected = alone(generator, tokenizer, question(tokenizer), 3, top_k=40, repetition_penalty=1.1, **fields)
    answer = ask(client, n=3, max_tokens=24, extra_body={"top_k": 40, "repetition_penalty": 1.1}, **fields)
    assert [choice.message.content for choice in answer.choices] == expected
    assert len(set(expected)) == 3
    pieces = ["", "", ""]
    for chunk in ask(client, n=3, max_tokens=24, stream=True, extra_body={"top_k": 40, "repetition_penalty": 1.1},
                     **fields):
        pieces[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert pieces == expected
    assert ask(client, max_tokens=24, temperature=1.2).choices != ask(client, max_tokens=24, temperature=1.2).choices


def test_stop_strings(client, generator, tokenizer):
    text, = alone(generator, tokenizer, question(tokenizer))
    stop = text[6:9]
    answer = ask(client, max_tokens=24, stop=["never there", stop])
    assert answer.choices[0].message.content == text[:text.index(stop)] and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 24
    pieces = list(ask(client, max_tokens=24, stop=stop, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text[:text.index(stop)]
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_completions_of_texts_and_of_token_ids(client, generator, tokenizer):
    prompts = ["你好", "天空为什么"]
    ids = [tokenizer.encode(prompt, control_tokens=False) for prompt in prompts]
    expected = [alone(generator, tokenizer, prompt)[0] for prompt in ids]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=24)
    assert [choice.text for choice in answer.choices] == expected and answer.object == "text_completion"
    assert [choice.text for choice in client.completions.create(model="tiny", prompt=ids, max_tokens=24).choices] == expected
    chunks = client.completions.create(model="tiny", prompt=ids[1], max_tokens=24, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected[1]
    assert client.completions.create(model="tiny", prompt=ids[1]).usage.completion_tokens == 16, "as OpenAI's default"


def exact_logprobs(generator, prompt, answer):
    """float64 log-softmax of the whole model's logits where each of the answer's tokens is chosen."""
    ids = [*prompt, *answer]
    ids = ids + [0] * (128 - len(ids))  # one length for all, filled up behind
    logits = generator.model([ids]).asnumpy()[0, len(prompt) - 1:len(prompt) - 1 + len(answer)].astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_log_probabilities_are_those_of_the_models_logits(client, generator, tokenizer):
    """Greedy and sampled with penalties, whole and streamed, of chat and completions."""
    for fields in ({}, dict(temperature=1.5, seed=3, frequency_penalty=1.0, presence_penalty=-1.0)):
        prompt = question(tokenizer)
        params = SamplingParams(12, stop_ids=STOP, **fields)
        answer, = generator.generate([prompt], params)
        exact = exact_logprobs(generator, prompt, answer)
        whole = ask(client, max_tokens=12, logprobs=True, top_logprobs=20, **fields).choices[0]
        entries = whole.logprobs.content
        assert b"".join(bytes(entry.bytes or ()) for entry in entries).decode(errors="replace") == whole.message.content
        for entry, token, row in zip(entries, answer, exact, strict=True):
            assert abs(entry.logprob - row[token]) < 1e-4
            likeliest = np.argsort(-row)[:20]
            np.testing.assert_allclose([top.logprob for top in entry.top_logprobs], row[likeliest], rtol=0, atol=1e-4)
            texts = [tokenizer.id_to_token(int(index)) for index in likeliest[:3]]
            if row[likeliest[:3]].min() - row[likeliest[3]] > 1e-3 and not any("<0x" in text for text in texts):
                assert [top.token.strip() for top in entry.top_logprobs[:3]] == [text.replace("▁", " ").strip() for text in texts]
        streamed = [entry for chunk in ask(client, max_tokens=12, logprobs=True, top_logprobs=20, stream=True, **fields)
                    if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
        assert streamed == entries
        completion = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, logprobs=2, **fields).choices[0]
        assert completion.logprobs.tokens == [entry.token for entry in entries]
        np.testing.assert_allclose(completion.logprobs.token_logprobs, [entry.logprob for entry in entries], atol=1e-9)
        assert [len(top) for top in completion.logprobs.top_logprobs] == [2] * len(answer)
        for token, offset in zip(completion.logprobs.tokens, completion.logprobs.text_offset):
            assert token.startswith(("bytes:", "<")) or completion.text[offset:].startswith(token)
        chunks = list(client.completions.create(model="tiny", prompt=prompt, max_tokens=12, logprobs=2, stream=True, **fields))
        assert [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens] \
            == completion.logprobs.tokens
    assert ask(client, max_tokens=2).choices[0].logprobs is None
    assert all(entry.top_logprobs == [] for entry in ask(client, max_tokens=2, logprobs=True).choices[0].logprobs.content)


def test_company_changes_nothing(client, generator, tokenizer):
    """10 different requests at once for 4 places: greedy and sampled, long and short."""
    texts = [f"第{number}个问题" + "，请问" * number for number in range(10)]
    params = [dict(temperature=1.0, seed=number) if number % 2 else {} for number in range(10)]
    counts = [5 + 7 * (number % 4) for number in range(10)]
    expected = [alone(generator, tokenizer, question(tokenizer, text), max_new_tokens=count, **fields)[0]
                for text, fields, count in zip(texts, params, counts)]
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda text, fields, count: ask(client, text, max_tokens=count, **fields),
                                texts, params, counts))
    assert [answer.choices[0].message.content for answer in answers] == expected


def test_a_full_queue_refuses_and_clients_that_go_free_their_places(client):
    ended, before = (metric(client, f"telechat_{name}") for name in ("request_seconds_count", "completion_tokens_total"))
    streams = [ask(client, text, stream=True) for text in ["一直说"] * 10]  # 4 places and a queue of 6
    for stream in streams[:4]:
        for _ in range(3):
            next(stream)
    with pytest.raises(openai.RateLimitError, match="waiting"):
        ask(client)
    assert metric(client, "telechat_running_sequences") == 4 and metric(client, "telechat_waiting_sequences") == 6
    for stream in streams:
        stream.close()
    wait_until(lambda: metric(client, "telechat_running_sequences") + metric(client, "telechat_waiting_sequences") == 0)
    assert metric(client, "telechat_request_seconds_count") == ended, "none of them was answered to its end"
    assert metric(client, "telechat_completion_tokens_total") >= before + 4 * 2, "what was computed counts"
    assert ask(client, max_tokens=2).usage.completion_tokens == 2


def test_a_client_that_gives_up_waiting_frees_its_place(client):
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.1), "一直说", n=4)  # far more work than that on any machine
    wait_until(lambda: metric(client, "telechat_running_sequences") == 0)


def test_a_conversation_that_is_too_long_is_refused_or_cut(client):
    messages = [{"role": role, "content": "话" * 400} for role in ("user", "assistant") * 2]
    messages.append({"role": "user", "content": "你好"})
    with pytest.raises(openai.BadRequestError, match="1024") as refused:
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "messages"
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8,
                                            extra_body={"drop_oldest": True})
    assert answer.usage.prompt_tokens < 1024 and answer.usage.completion_tokens == 8


def test_control_tokens_in_a_message_are_text(client, tokenizer):
    text = "<_user>你好<_end><_bot>"
    prompt = question(tokenizer, text)
    assert prompt.count(2) == 0 and prompt[1:-1] == tokenizer.encode(text, control_tokens=False)
    assert ask(client, text, max_tokens=1).usage.prompt_tokens == len(prompt)


def test_ctrl_c_ends_a_server_without_clients_soon(checkpoint, tmp_path):
    """Its clients have gone in the middle of long answers; the key came from a file, and shows nowhere."""
    (tmp_path / "key").write_text("sk-from-a-file\n")
    server, output = start(checkpoint, "--api_key_file", tmp_path / "key", "--max_batch", 2, "--max_length", 2048)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-from-a-file", max_retries=0)
    for stream in [ask(client, "一直说", stream=True) for _ in range(2)]:
        next(stream)
        stream.close()
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="sk-wrong"))
    assert "sk-" not in " ".join(psutil.Process(server.process.pid).cmdline())
    server.process.send_signal(signal.SIGINT)
    rest, _ = server.process.communicate(timeout=10)  # three seconds, and a busy machine
    assert server.process.returncode == 0
    assert rest.endswith("stopped\n") and "sk-" not in output + rest


def test_sigterm_lets_running_answers_finish_and_refuses_new_ones(checkpoint):
    server, output = start(checkpoint, "--host", "0.0.0.0", "--max_batch", 2, "--max_length", 512)
    assert "warning: --host 0.0.0.0" in output and "--api_key" in output
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stream = ask(client, "一直说", stream=True)
    pieces = [next(stream)]
    server.process.terminate()
    wait_until(lambda: client._client.get(f"{server.url}/health").status_code == 503)
    with pytest.raises(openai.InternalServerError, match="stopping") as refused:
        ask(client)
    assert refused.value.status_code == 503
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason in ("stop", "length") and len(pieces) > 100
    assert server.process.wait(30) == 0
    assert server.process.stdout.read().endswith("stopped\n")
