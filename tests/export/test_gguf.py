"""The export to GGUF: llama.cpp computes what the official code does; the files themselves are read by the gguf package.

llama.cpp's part runs in `make test-export`, which builds llama-cpp-python.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from telechat import InputError, TeleChat, Tokenizer
from telechat.checkpoint import gguf_export, gguf_tokenizer
from telechat.checkpoint.convert import torch_to_ms
from telechat.checkpoint.gguf_export import to_gguf
from telechat.config import TeleChatConfig
from telechat.generation.chat import build_prompt
from tests.conftest import ROOT, save_small_model
from tests.test_model import small_config

gguf = pytest.importorskip("gguf", reason="needs the package gguf, of the extra `export`")
llama_cpp = pytest.importorskip("llama_cpp") if importlib.util.find_spec("llama_cpp") else None
needs_llama_cpp = pytest.mark.skipif(llama_cpp is None, reason="needs llama-cpp-python; make test-export builds it")
DEMO = ROOT / "demo" / "run" / "final"


def load(path, **settings):
    return llama_cpp.Llama(str(path), **{"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False, **settings})


def logits_of(model, ids):
    model.reset()
    model.eval([int(token) for token in ids])
    return np.array(model.scores[:len(ids)])


def tensors_of(path):
    """Name → (float32 array, type) of a file, dequantised by the gguf package."""
    return {tensor.name: (gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]),
                          tensor.tensor_type.name) for tensor in gguf.GGUFReader(path).tensors}


@needs_llama_cpp
def test_official_logits_and_tokens(reference, tmp_path):
    """In float32 nothing but the float16 rounding of TeleChat-1's and 2's tables is apart, which llama.cpp has not."""
    to_gguf(reference.directory, tmp_path / "model.gguf", "f32")
    golden = reference.golden
    exact = {"type_k": 0, "type_v": 0, "logits_all": True}  # a float32 cache
    model = load(tmp_path / "model.gguf", **exact)
    ours = reference.model()
    allowed = 4e-3 if ours.config.rotary_float16 else 2e-5
    found = np.stack([logits_of(model, ids) for ids in golden["input_ids"]])
    assert np.abs(found - golden["logits"]).max() < allowed * np.abs(golden["logits"]).max()
    ours.config = dataclasses.replace(ours.config, rotary_float16=False)
    expected = ours(golden["input_ids"]).asnumpy()
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    for prompt, greedy in zip(golden["prompt_ids"], golden["greedy_ids"]):
        assert np.array_equal(logits_of(model, greedy[:-1]).argmax(-1)[len(prompt) - 1:], greedy[len(prompt):])


@needs_llama_cpp
def test_long_positions_of_every_rotary_table(reference, tmp_path):
    """300 positions, where a frequency that is 1 % off shows."""
    to_gguf(reference.directory, tmp_path / "model.gguf", "f32")
    ours = reference.model()
    ours.config = dataclasses.replace(ours.config, rotary_float16=False)
    ids = np.random.default_rng(3).integers(0, ours.config.vocab_size, 300).astype(np.int32)
    expected = ours(ids[None]).asnumpy()[0]
    found = logits_of(load(tmp_path / "model.gguf", type_k=0, type_v=0, logits_all=True), ids)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_the_demo_model_gives_the_taught_answers(tmp_path, kind):
    if not DEMO.is_dir():
        pytest.skip("needs demo/run/final, of make demo")
    to_gguf(DEMO, tmp_path / "demo.gguf", kind)
    model = load(tmp_path / "demo.gguf")
    taught = [json.loads(line) for line in (ROOT / "samples/conversations.jsonl").read_text(encoding="utf-8").splitlines()]
    single = [turn for turn in taught if "<_bot>" not in turn["input"]][:12]
    right = 0
    for turn in single:
        question = turn["input"].removeprefix("<_user>")
        answer = model.create_chat_completion([{"role": "user", "content": question}], temperature=0, max_tokens=160)
        choice = answer["choices"][0]
        right += choice["message"]["content"].strip() == turn["output"].strip() and choice["finish_reason"] == "stop"
    # 4 bits are coarse for a model of 4 million parameters: half of what it was taught is enough.
    assert right >= (len(single) if kind != "q4_0" else len(single) // 2), (right, len(single))


def write_vocabulary(folder, path, rows):
    """A GGUF file of a folder's tokenizer and nothing else."""
    writer = gguf.GGUFWriter(path, "llama")
    config = TeleChatConfig(vocab_size=rows, hidden_size=32, n_layer=1, n_head=2, ffn_hidden_size=32)
    assert gguf_tokenizer.add_tokenizer(writer, gguf, folder, config)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_ti_data_to_file, writer.close):
        write()


@needs_llama_cpp
@pytest.mark.parametrize("name, published, rows", [
    ("12b", "telechat_12b", 120000), ("52b", "telechat_52b", 80896), ("telechat2", "telechat2_115b", 131072),
    ("telechat3", "telechat3_36b", 131072)])
def test_official_ids_of_texts(shared, tmp_path, name, published, rows):
    (tmp_path / "tokenizer.model").write_bytes((shared / f"data/{published}.tokenizer.model").read_bytes())
    write_vocabulary(tmp_path, tmp_path / "vocabulary.gguf", rows)
    model, ours = load(tmp_path / "vocabulary.gguf", vocab_only=True), Tokenizer.from_pretrained(tmp_path)
    cases = json.loads((shared / f"reference/tokenizer_{name}.json").read_text(encoding="utf-8"))["cases"]
    for case in cases:
        text = case["text"]
        if "\x00" in text:
            continue  # the end of a text in C
        assert model.tokenize(text.encode(), add_bos=False, special=False) == ours.encode(text, control_tokens=False), text
    assert len(cases) >= 200


def chat_ids(model, messages, prompt=True):
    """The ids of a chat by the template and tokenizer that the file holds, as llama.cpp's own chat would have them."""
    formatter = llama_cpp.llama_chat_format.Jinja2ChatFormatter(model.metadata["tokenizer.chat_template"], "", "", prompt)
    return model.tokenize(formatter(messages=messages).prompt.encode(), add_bos=False, special=True)


@needs_llama_cpp
@pytest.mark.parametrize("name, published, rows", [("telechat2", "telechat2_115b", 131072), ("telechat3", "telechat3_36b", 131072)])
def test_official_ids_of_chats(shared, tmp_path, name, published, rows):
    (tmp_path / "tokenizer.model").write_bytes((shared / f"data/{published}.tokenizer.model").read_bytes())
    write_vocabulary(tmp_path, tmp_path / "vocabulary.gguf", rows)
    model = load(tmp_path / "vocabulary.gguf", vocab_only=True)
    cases = [case for case in json.loads((shared / f"reference/chat_{name}.json").read_text(encoding="utf-8"))
             if case.get("format", "template") == "template" and not case["tools"]
             and "</think>" not in json.dumps(case["messages"])]
    assert len(cases) > 9
    for case in cases:
        assert chat_ids(model, case["messages"], case["add_generation_prompt"]) == case["ids"], case["case"]


MESSAGES = [{"role": "user", "content": "一 b\nc 12"}, {"role": "assistant", "content": "二"}, {"role": "user", "content": "三"}]


def check_chat(folder, rows):
    """A chat's ids through llama.cpp are those of our own chat."""
    write_vocabulary(folder, folder / "vocabulary.gguf", rows)
    ours = Tokenizer.from_pretrained(folder)
    history = [{**message, "role": "bot" if message["role"] == "assistant" else "user"} for message in MESSAGES[:2]]
    expected = build_prompt(ours, history, MESSAGES[2]["content"], 1 << 20)
    assert chat_ids(load(folder / "vocabulary.gguf", vocab_only=True), MESSAGES) == expected


@needs_llama_cpp
@pytest.mark.parametrize("published, rows", [("telechat_12b", 120000), ("telechat_52b", 80896)])
def test_ids_of_the_first_models_chats(shared, tmp_path, published, rows):
    (tmp_path / "tokenizer.model").write_bytes((shared / f"data/{published}.tokenizer.model").read_bytes())
    check_chat(tmp_path, rows)


@needs_llama_cpp
@pytest.mark.parametrize("splitting", ["gpt-2", "bloom"])
def test_ids_of_a_byte_level_tokenizer(tmp_path, save_byte_level, splitting):
    save_byte_level(tmp_path, splitting)
    check_chat(tmp_path, 700)
    model, ours = load(tmp_path / "vocabulary.gguf", vocab_only=True), Tokenizer.from_pretrained(tmp_path)
    for line in (ROOT / "samples/conversations.jsonl").read_text(encoding="utf-8").splitlines()[:20]:
        text = json.loads(line)["output"] + " (a, b…) x1y2  12 345!"
        assert model.tokenize(text.encode(), add_bos=False, special=False) == ours.encode(text, control_tokens=False), text


def test_what_the_file_holds(tmp_path):
    """Names, types, and the rows of queries and keys in pairs; q8_0 within half a step, the scale rounded to float16."""
    config = small_config(hidden_size=64, n_head=4, ffn_hidden_size=96, vocab_size=90, tie_word_embeddings=False, use_bias=True,
                          input_mult=3.0, output_mult=2.0)
    model = TeleChat(config, seed=5)
    model.save_pretrained(tmp_path / "ours")
    weights = {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}
    size, notes = to_gguf(tmp_path / "ours", tmp_path / "q8.gguf", "q8_0")
    assert not any("stored as f16" in note for note in notes)
    assert size == (tmp_path / "q8.gguf").stat().st_size and any("no tokenizer" in note for note in notes)
    found = tensors_of(tmp_path / "q8.gguf")
    block = {"attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight", "attn_output.bias",
             "ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight", "ffn_down.bias"}
    assert set(found) == {f"blk.{layer}.{name}" for layer in range(config.n_layer) for name in block} | {
        "token_embd.weight", "output_norm.weight", "output.weight"}
    assert {kind for name, (array, kind) in found.items() if array.ndim == 1} == {"F32"}
    assert {kind for name, (array, kind) in found.items() if array.ndim == 2} == {"Q8_0"}
    query = weights["transformer.h.1.self_attention.query.weight"]
    dim = config.head_dim
    rows = [head * dim + half * dim // 2 + pair for head in range(4) for pair in range(dim // 2) for half in range(2)]
    keys = weights["transformer.h.1.self_attention.key_value.weight"].reshape(4, 2, dim, 64)[:, 0].reshape(64, 64)
    for name, expected in (("blk.1.attn_q.weight", query[rows]), ("blk.1.attn_k.weight", keys[rows]),
                           ("token_embd.weight", 3.0 * weights["transformer.word_embeddings.weight"]),
                           ("output.weight", config.logits_scale * weights["lm_head.weight"])):
        step = np.abs(expected.reshape(-1, 32)).max(-1, keepdims=True) / 127
        apart = np.abs(found[name][0] - expected).reshape(-1, 32)
        assert (apart <= step * (0.5 + 127 * 2 ** -11)).all(), name
    fields = gguf.GGUFReader(tmp_path / "q8.gguf").fields
    assert fields["llama.context_length"].contents() == config.training_seqlen
    assert all(note in fields["general.description"].contents() for note in notes)


def test_rows_that_no_block_fits_are_float16(tmp_path):
    TeleChat(small_config(hidden_size=64, ffn_hidden_size=72, vocab_size=90), seed=1).save_pretrained(tmp_path / "ours")
    _, notes = to_gguf(tmp_path / "ours", tmp_path / "q4.gguf", "q4_0")
    kinds = {name: kind for name, (_, kind) in tensors_of(tmp_path / "q4.gguf").items()}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"], kinds["token_embd.weight"]) == ("F16", "Q4_0", "Q8_0")
    assert "Matrices whose rows are no multiple of 32 are stored as f16, not q4_0." in notes


def test_yarn_s_factors_are_those_of_the_official_frequencies(shared, tmp_path):
    """llama.cpp divides its own frequency by the factor."""
    official = shared / "reference" / "telechat3_tiny"
    torch_to_ms(str(official), str(tmp_path / "ours"))
    to_gguf(tmp_path / "ours", tmp_path / "model.gguf", "f32")
    config = json.loads((official / "config.json").read_text())
    own = config["rope_theta"] ** (-np.arange(0, config["head_dim"], 2) / config["head_dim"])
    factors, kind = tensors_of(tmp_path / "model.gguf")["rope_freqs.weight"]
    assert kind == "F32" and np.allclose(own / factors, np.load(official / "golden.npz")["rope_inv_freq"], rtol=1e-6)


BLOOM = {"type": "Split", "pattern": {"Regex": gguf_tokenizer._BLOOM}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize("steps, name", [
    ([{"type": "ByteLevel"}], "gpt-2"), ([{"type": "ByteLevel", "use_regex": False}], None), ([{"type": "Whitespace"}], None),
    ([{"type": "ByteLevel", "add_prefix_space": True}], None), ([], None),
    ([BLOOM, {"type": "ByteLevel", "use_regex": False}], "bloom"), ([BLOOM, {"type": "ByteLevel"}], None),
    ([{**BLOOM, "invert": True}, {"type": "ByteLevel", "use_regex": False}], None), ([BLOOM, {"type": "Whitespace"}], None),
    ([BLOOM, BLOOM, {"type": "ByteLevel", "use_regex": False}], None),
])
def test_how_words_are_cut_is_named_as_llama_cpp_names_it(steps, name):
    assert gguf_tokenizer._splitting({"type": "Sequence", "pretokenizers": steps}) == name
    if len(steps) == 1:
        assert gguf_tokenizer._splitting(steps[0]) == name


def refused(match, source, target, kind="f16"):
    before = target.read_bytes() if target.is_file() else None
    with pytest.raises(InputError, match=match):
        to_gguf(source, target, kind)
    assert (target.read_bytes() if target.is_file() else None) == before
    assert not list(target.parent.glob("*.partial"))


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    """And an older file stays as it is."""
    old = tmp_path / "old.gguf"
    old.write_text("older")
    TeleChat(small_config(position_embedding="alibi")).save_pretrained(tmp_path / "alibi")
    refused("has ALiBi in place of rotary positions, which Llama has not", tmp_path / "alibi", old)
    save_small_model(tmp_path / "ours")
    refused("is a directory; give --output the name of a file", tmp_path / "ours", tmp_path)
    refused("cannot be written .*; free some space or give another --output", tmp_path / "ours", tmp_path / "absent/m.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_export, "llama_tensors", lambda config, read: {
            "model.norm.weight": lambda: np.ones(32), "lm_head.weight": lambda: np.full((1664, 32), 7e4, np.float32)})
        refused("output.weight holds a number that is outside float16, which f16 needs; give --type f32", tmp_path / "ours", old)
    save_small_model(tmp_path / "small", vocab_size=100)
    refused("has 1664 tokens and the model 100 rows", tmp_path / "small", old)
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(r"to-gguf needs the package gguf; pip install 'telechat\[export\]'", tmp_path / "ours", old)


@pytest.mark.parametrize("model_type, name", [("unigram", "identity"), ("bpe", "nmt_nfkc")])
def test_tokenizers_that_llama_cpp_cuts_otherwise_are_refused(tmp_path, save_byte_level, model_type, name):
    save_small_model(tmp_path / "ours", vocab_size=2000)
    lines = (ROOT / "samples/conversations.jsonl").read_text(encoding="utf-8").splitlines()
    with open(tmp_path / "ours/tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, model_type=model_type, vocab_size=1200, byte_fallback=True,
            character_coverage=0.98, normalization_rule_name=name, remove_extra_whitespaces=False, pad_id=3, minloglevel=2,
            unk_surface="", user_defined_symbols=["<_user>", "<_bot>", "<_end>"])
    refused("is no BPE model that takes texts as they are", tmp_path / "ours", tmp_path / "model.gguf")
    (tmp_path / "ours/tokenizer.model").unlink()
    save_byte_level(tmp_path / "ours", "whitespace")
    refused("cuts texts in a way that llama.cpp has no name for", tmp_path / "ours", tmp_path / "model.gguf")


def test_the_tool(tmp_path):
    save_small_model(tmp_path / "ours")
    done = subprocess.run([sys.executable, str(ROOT / "tools/convert.py"), "to-gguf", "--mindspore_path", tmp_path / "ours",
                           "--output", tmp_path / "model.gguf"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {(tmp_path / 'model.gguf').stat().st_size / 1e6:,.1f} MB to")
    assert "note: The extension of the context beyond" in done.stdout
