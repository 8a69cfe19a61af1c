"""The export to Llama's form: transformers, without our code, computes what the official code does."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from telechat import InputError, TeleChat, TeleChatConfig, Tokenizer
from telechat.checkpoint.convert import torch_to_ms
from telechat.checkpoint.llama import to_llama
from telechat.generation.chat import build_prompt
from tests.conftest import save_small_model
from tests.test_model import small_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", reason="needs the package transformers, of the extra `dev`")


def load(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_official_logits_and_tokens(reference, tmp_path):
    to_llama(reference.directory, tmp_path / "llama")
    golden, model = reference.golden, load(tmp_path / "llama")
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        logits = model(torch.tensor(golden["input_ids"]).long()).logits.numpy()
        # What is apart is the float16 rounding of TeleChat-1's and 2's tables, which Llama has not: without it nothing is.
        ours = reference.model()
        allowed = 4e-3 if ours.config.rotary_float16 else 1e-5
        assert np.abs(logits - golden["logits"]).max() < allowed * np.abs(golden["logits"]).max()
        ours.config = dataclasses.replace(ours.config, rotary_float16=False)
        exact = ours(golden["input_ids"]).asnumpy()
        assert np.abs(logits - exact).max() < 1e-5 * np.abs(exact).max()
        prompts = torch.tensor(golden["prompt_ids"]).long()
        made = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, eos_token_id=None,
                              pad_token_id=0, max_new_tokens=golden["greedy_ids"].shape[1] - prompts.shape[1])
    assert np.array_equal(made.numpy(), golden["greedy_ids"])


def test_muP_biases_and_tied_heads_in_float64_terms(tmp_path):
    """A model with every multiplier: embeddings and head carry them, so that Llama's plain forward agrees with ours."""
    config = small_config(input_mult=2.0, output_mult=2.0, mup_scale_factor=4.0, tie_word_embeddings=False, use_bias=True,
                          rotary_float16=False, initializer_range=0.2)
    model = TeleChat(config, seed=5)
    model.save_pretrained(tmp_path / "ours")
    to_llama(tmp_path / "ours", tmp_path / "llama")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 11))
    with torch.no_grad():
        theirs = load(tmp_path / "llama")(torch.tensor(ids)).logits.numpy()
    ours = model(ids.astype(np.int32)).asnumpy()
    assert np.abs(theirs - ours).max() < 1e-5 * np.abs(ours).max()


def test_what_is_not_carried_over_is_said_and_written(reference, tmp_path):
    _, notes = to_llama(reference.directory, tmp_path / "llama")
    written = (tmp_path / "llama/EXPORT.md").read_text(encoding="utf-8")
    assert all(note in written for note in notes)
    config = TeleChatConfig.from_pretrained(reference.directory)
    assert any("NTK" in note for note in notes) == (config.yarn is None)
    assert any("float16" in note for note in notes) == config.rotary_float16


def test_alibi_and_the_same_directory_are_refused(tmp_path):
    TeleChat(small_config(position_embedding="alibi")).save_pretrained(tmp_path / "alibi")
    with pytest.raises(InputError, match="has ALiBi in place of rotary positions, which Llama has not"):
        to_llama(tmp_path / "alibi", tmp_path / "llama")
    assert not (tmp_path / "llama").exists()
    with pytest.raises(InputError, match="is both input and output; give another --output_dir"):
        to_llama(tmp_path / "alibi", tmp_path / "alibi")


def ids_of(tokenizer, messages, add_generation_prompt):
    made = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=add_generation_prompt)
    return made if isinstance(made, list) else made["input_ids"]


def test_tokenizer_and_chat_template(tmp_path):
    """Ids of texts, and of a chat, are those that the model was trained with."""
    save_small_model(tmp_path / "ours")
    _, notes = to_llama(tmp_path / "ours", tmp_path / "llama")
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama"), Tokenizer.from_pretrained(tmp_path / "ours")
    assert any("such as a digit" in note and "Behind a space" in note for note in notes)
    for text in ("3 apples", "361个", "\n7"):  # as EXPORT.md says
        assert tokenizer.encode(" " + text, add_special_tokens=False) == ours.encode(text, control_tokens=False), text
    for text in ("生抽与老抽的区别？", "hello  world 123", "a\nb\n\n 一"):
        assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(text, control_tokens=False), text
    history = [{"role": "user", "content": "一 b\nc"}, {"role": "bot", "content": "二"}]
    messages = [history[0], {"role": "assistant", "content": "二"}, {"role": "user", "content": "三"}]
    assert ids_of(tokenizer, messages, True) == build_prompt(ours, history, "三", 1 << 20)
    assert ids_of(tokenizer, [{"role": "user", "content": "361个"}], True) == build_prompt(ours, [], "361个", 1 << 20)


def test_chat_of_a_byte_level_tokenizer(tmp_path, save_byte_level):
    """7B's has no leading space, and its chat template writes none."""
    save_small_model(tmp_path / "ours")
    (tmp_path / "ours/tokenizer.model").unlink()
    save_byte_level(tmp_path / "ours", "bloom")
    to_llama(tmp_path / "ours", tmp_path / "llama")
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama"), Tokenizer.from_pretrained(tmp_path / "ours")
    assert ids_of(tokenizer, [{"role": "user", "content": "一 b\nc"}], True) == build_prompt(ours, [], "一 b\nc", 1 << 20)


@pytest.mark.parametrize("name, published", [("telechat2", "telechat2_115b"), ("telechat3", "telechat3_36b")])
def test_chat_template_of_the_later_models(shared, tmp_path, name, published):
    """The publisher's ids: turns, system text, the opening thought."""
    torch_to_ms(shared / f"reference/{name}_tiny", tmp_path / "ours")
    shutil.copy(shared / f"data/{published}.tokenizer.model", tmp_path / "ours/tokenizer.model")
    to_llama(tmp_path / "ours", tmp_path / "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    cases = [case for case in json.loads((shared / f"reference/chat_{name}.json").read_text(encoding="utf-8"))
             if case.get("format", "template") == "template" and not case["tools"]
             and "</think>" not in json.dumps(case["messages"])]
    assert len(cases) > 9
    for case in cases:
        assert ids_of(tokenizer, case["messages"], case["add_generation_prompt"]) == case["ids"], case["case"]


def test_chat_template_of_the_coder(shared, tmp_path):
    """The turns and the opening thought of `CoderTemplate`, whatever template lay in the folder."""
    torch_to_ms(shared / "reference/telechat3_tiny", tmp_path / "ours")
    shutil.copy(shared / "data/telechat3_36b.tokenizer.model", tmp_path / "ours/tokenizer.model")
    (tmp_path / "ours/chat_template.jinja").write_text("{{ '<param_key>' }}")
    to_llama(tmp_path / "ours", tmp_path / "llama")
    tokenizer, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama"), Tokenizer.from_pretrained(tmp_path / "ours")
    messages = [{"role": "system", "content": "甲"}, {"role": "user", "content": "一"}, {"role": "assistant", "content": "二"},
                {"role": "user", "content": "三"}]
    history = [{**message, "role": "bot"} if message["role"] == "assistant" else message for message in messages[:-1]]
    assert ids_of(tokenizer, messages, True) == build_prompt(ours, history, "三", 1 << 20)
    assert ids_of(tokenizer, messages[1:2], True) == build_prompt(ours, [], "一", 1 << 20)
