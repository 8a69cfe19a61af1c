"""tools/generate.py: prompts, files, chat and what it refuses, on tiny official models with real tokenizers."""

import json
import shutil

import pytest

from telechat import Generator, SamplingParams, TeleChat, Tokenizer
from telechat.generation import chat
from tests.conftest import ROOT, assert_refused

SAMPLES = ROOT / "samples"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random model with the shipped tokenizer and a generation_config.json."""
    from telechat import TeleChatConfig

    directory = tmp_path_factory.mktemp("chat") / "checkpoint"
    config = TeleChatConfig(vocab_size=1664, hidden_size=32, n_layer=2, n_head=4, ffn_hidden_size=48,
                            training_seqlen=64, initializer_range=0.3)
    TeleChat(config).save_pretrained(directory)
    shutil.copy(SAMPLES / "tokenizer.model", directory)
    (directory / "generation_config.json").write_text(json.dumps(
        {"max_length": 48, "do_sample": False, "temperature": 0.3, "top_k": 5, "repetition_penalty": 1.2,
         "eos_token_id": 2, "user_token_id": 20, "bot_token_id": 21}))
    return directory


def expected_answer(checkpoint, prompt, **params):
    """What the library gives for a prompt with the file's defaults."""
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    params = SamplingParams(**{**dict(max_new_tokens=10, repetition_penalty=1.2, stop_ids=(2,)), **params})
    answer = Generator(TeleChat.from_pretrained(checkpoint), 48).generate([prompt], params)[0]
    return tokenizer.decode(answer, skip_control_tokens=True)


def test_predict_data_honours_control_tokens(checkpoint, tool):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    prompt = [20, *tokenizer.encode("生抽与老抽的区别？"), 21]
    result = tool("generate.py", "--load_checkpoint", checkpoint, "--predict_data", "<_user>生抽与老抽的区别？<_bot>",
                  "--max_new_tokens", 10)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip("\n") == expected_answer(checkpoint, prompt).rstrip("\n")


def test_sampling_flags_reach_the_sampler(checkpoint, tool):
    prompt = [20, *Tokenizer.from_pretrained(checkpoint).encode("你好"), 21]
    flags = ["--temperature", 1.5, "--top_k", 50, "--top_p", 0.9, "--repetition_penalty", 1.0, "--seed", 3]
    result = tool("generate.py", "--load_checkpoint", checkpoint, "--predict_data", "你好", "--max_new_tokens", 10, *flags)
    wanted = expected_answer(checkpoint, prompt, temperature=1.5, top_k=50, top_p=0.9, repetition_penalty=1.0, seed=3)
    assert result.stdout.rstrip("\n") == wanted.rstrip("\n")


def test_input_file_is_one_conversation_and_independent_is_not(checkpoint, tool, tmp_path):
    path = tmp_path / "input.json"
    path.write_text('{"input": "你好"}\n{"input": "再见"}\n', encoding="utf-8")
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    together = tool("generate.py", "--load_checkpoint", checkpoint, "--input_file", path, "--max_new_tokens", 10)
    first = expected_answer(checkpoint, chat.build_prompt(tokenizer, [], "你好", 38))
    history = [{"role": "user", "content": "你好"}, {"role": "bot", "content": first}]
    second = expected_answer(checkpoint, chat.build_prompt(tokenizer, history, "再见", 38, fit=True))
    assert together.stdout == f"> 你好\n{first}\n\n> 再见\n{second}\n\n"
    alone = [expected_answer(checkpoint, chat.build_prompt(tokenizer, [], text, 38)) for text in ("你好", "再见")]
    for batch in (1, 4):
        result = tool("generate.py", "--load_checkpoint", checkpoint, "--input_file", path, "--independent",
                      "--max_new_tokens", 10, "--batch_size", batch)
        assert result.stdout == f"> 你好\n{alone[0]}\n\n> 再见\n{alone[1]}\n\n"
    assert second != alone[1], "history makes a difference"


def test_interactive_chat_keeps_a_history_and_clears_it(checkpoint, tool):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    # A typed control token is text: the prompt has no second user token.
    typed = "<_user>你好<_end>"
    first = expected_answer(checkpoint, [20, *tokenizer.encode(typed, control_tokens=False), 21])
    history = [{"role": "user", "content": typed}, {"role": "bot", "content": first}]
    prompt = chat.build_prompt(tokenizer, history, "再见", 38, honour_leading_marker=False, fit=True)
    second = expected_answer(checkpoint, prompt)
    fresh = expected_answer(checkpoint, chat.build_prompt(tokenizer, [], "再见", 38))
    result = tool("generate.py", "--load_checkpoint", checkpoint, "--max_new_tokens", 10,
                  stdin=f"{typed}\n再见\n/clear\n再见\n/exit\nnever\n")
    assert result.returncode == 0, result.stderr
    answers = result.stdout.split("\n", 1)[1]
    assert answers == f"> {first}\n\n> {second}\n\n> cleared\n\n> {fresh}\n\n> "


def test_a_long_chat_drops_its_oldest_turns(checkpoint, tool):
    result = tool("generate.py", "--load_checkpoint", checkpoint, "--max_new_tokens", 10, stdin="你好，请问一下\n" * 6)
    assert result.returncode == 0 and "error" not in result.stdout + result.stderr


@pytest.mark.parametrize("size, user, bot, stop", [("12b", 20, 21, 2), ("52b", 25, 26, 2)])
def test_published_settings(shared, tmp_path, size, user, bot, stop):
    """52B's published user and bot ids are those of 12B, emoji in its vocabulary: the right ones replace them."""
    from telechat import TeleChatConfig
    from telechat.generation.settings import GenerationSettings

    for name in ("config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(shared / "data" / f"telechat_{size}.{name}", tmp_path / name)
    published = json.loads((tmp_path / "generation_config.json").read_text())
    settings = GenerationSettings.load(tmp_path, TeleChatConfig.from_pretrained(tmp_path))
    assert (settings.chat_format.user, settings.chat_format.bot) == (user, bot)
    assert settings.stop_ids == (stop,)
    assert settings.sampling["temperature"] == 0.0, "published with do_sample false"
    assert settings.sampling["repetition_penalty"] == published["repetition_penalty"]
    assert settings.max_length == min(published["max_length"], 4096 if size == "52b" else 8192)


@pytest.mark.parametrize("flags, words", [
    (["--predict_data", "a", "--input_file", "b"], ["--predict_data", "--input_file"]),
    (["--independent"], ["--independent"]),
    (["--input_file", "absent.json"], ["absent.json"]),
    (["--predict_data", "你好", "--top_p", "2"], ["top_p"]),
    (["--predict_data", "你好", "--max_new_tokens", "0"], ["max_new_tokens"]),
    (["--predict_data", "你好", "--max_length", "3"], ["max_length 3"]),
    (["--predict_data", "你好" * 60], ["max_length 48"]),
])
def test_bad_flags_are_refused(checkpoint, tool, flags, words):
    assert_refused(tool("generate.py", "--load_checkpoint", checkpoint, *flags), *words)


def test_bad_checkpoints_are_refused(checkpoint, tool, tmp_path):
    assert_refused(tool("generate.py", "--load_checkpoint", tmp_path / "absent"), "absent", "config.json")
    bad = tmp_path / "bad"
    shutil.copytree(checkpoint, bad)
    (bad / "generation_config.json").write_text("{")
    assert_refused(tool("generate.py", "--load_checkpoint", bad), "generation_config.json")
    (bad / "generation_config.json").unlink()
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps({**config, "vocab_size": 1600}))
    assert_refused(tool("generate.py", "--load_checkpoint", bad), "1664", "1600")
    (bad / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    assert_refused(tool("generate.py", "--load_checkpoint", bad), "transformer.h.2.")
    (bad / "tokenizer.model").unlink()
    assert_refused(tool("generate.py", "--load_checkpoint", bad), "tokenizer")
    bad_lines = tmp_path / "lines.json"
    bad_lines.write_text('{"input": "你好"}\n{"inputs": "x"}\n', encoding="utf-8")
    assert_refused(tool("generate.py", "--load_checkpoint", checkpoint, "--input_file", bad_lines), "line 2", "input")
