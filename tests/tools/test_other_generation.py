"""The tokenizer of TeleChat2 in the folder of a model of TeleChat3, and the other way about: refused by every tool."""

import json
import os
import shutil

import pytest

from telechat import InputError, TeleChat, TeleChatConfig, Tokenizer
from telechat.data.preprocess import preprocess
from telechat.data.mixture import MixtureFile
from tests.conftest import load_tool
from tests.wrong_use.checks import snapshot

FILES = {"TeleChat2": "telechat2_115b", "TeleChat3": "telechat3_36b"}
CONFIGS = {
    "TeleChat2": dict(model_type="telechat", vocab_size=131072, hidden_size=8, n_layer=1, n_head=2, ffn_hidden_size=8,
                      tie_word_embeddings=False, training_seqlen=64, base_seqlen=64),
    "TeleChat3": dict(model_type="telechat3", vocab_size=131072, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                      intermediate_size=8, max_position_embeddings=64, tie_word_embeddings=False),
}


@pytest.fixture(scope="module", params=FILES)
def folder(request, shared, tmp_path_factory):
    """A model of one generation with the other's tokenizer, data, and the dataset that the tokenizer made of it."""
    made = tmp_path_factory.mktemp(request.param)
    other = next(name for name in FILES if name != request.param)
    tokenizer = shared / f"data/{FILES[other]}.tokenizer.model"
    TeleChat(TeleChatConfig.from_dict(CONFIGS[request.param])).save_pretrained(made / "model")
    shutil.copy(tokenizer, made / "model/tokenizer.model")
    (made / "lines.jsonl").write_text(json.dumps({"input": "q", "output": "a"}) + "\n")
    (made / "run.yaml").write_text("learning_rate: 1.0e-5\n")
    preprocess([MixtureFile(str(made / "lines.jsonl"))], Tokenizer.from_pretrained(tokenizer), str(made / "data"), 60)
    return made, request.param, other


@pytest.mark.parametrize("tool, flags", [
    ("preprocess", "--input_dataset_file {0}/lines.jsonl --output_path out --vocab_file_path {0}/model --max_length 60"),
    ("preprocess", "--input_dataset_file {0}/lines.jsonl --output_path out --vocab_file_path {0}/model/tokenizer.model"),
    ("train", "--config {0}/run.yaml --train_dataset {0}/data --load_checkpoint {0}/model --output_dir out total_steps=1 batch_size=1"),
    ("generate", "--load_checkpoint {0}/model --predict_data q"),
    ("serve", "--load_checkpoint {0}/model --port 0"),
])
def test_refused(folder, tool, flags, tmp_path, monkeypatch):
    made, model, other = folder
    monkeypatch.chdir(tmp_path)
    before = snapshot(made)
    described = "TeleChat-1 or TeleChat2" if model == "TeleChat2" else model
    with pytest.raises(InputError) as refused:
        load_tool(tool).main(flags.format(made).split())
    assert str(refused.value) == (
        f"{made}/model/tokenizer.model is the tokenizer of {other}, and config.json describes a model of {described}, whose "
        "control tokens 9 to 14 mean something else; give the tokenizer that was published with the model")
    assert os.listdir(tmp_path) == [] and snapshot(made) == before


def test_names_of_the_folder_go_before_the_pieces(shared, tmp_path):
    """A tokenizer.model of TeleChat2's whose folder names thoughts is TeleChat3's."""
    shutil.copy(shared / "data/telechat2_115b.tokenizer.model", tmp_path / "tokenizer.model")
    names = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {
        str(9 + number): {"content": name} for number, name in enumerate(names)}}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["TeleChat3"]))
    (tmp_path / "lines.jsonl").write_text(json.dumps({"input": "q", "output": "a"}))
    made = preprocess([MixtureFile(str(tmp_path / "lines.jsonl"))], Tokenizer.from_pretrained(tmp_path), str(tmp_path / "out"), 60)
    assert made["train"]["conversations"] == 1
