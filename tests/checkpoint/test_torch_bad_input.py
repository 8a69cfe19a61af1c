"""What torch-to-ms and ms-to-torch refuse: one sentence, and nothing written."""

import os
import pathlib
import subprocess
import sys

import pytest

from telechat.checkpoint.convert import ms_to_torch, torch_to_ms
from telechat.errors import InputError

torch = pytest.importorskip("torch", reason="conversion needs torch: install the extra `convert`")

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODELS = ("7b", "12b", "52b")


def test_model_name_only_checks(tmp_path, make_official, write_official):
    for model in MODELS:
        source = write_official(*make_official(model), name=model)
        for other in MODELS:
            if other == model:
                torch_to_ms(source, tmp_path / f"ms-{model}", model_name=f"telechat_{other}")
            else:
                with pytest.raises(InputError, match=f"telechat_{model}, not of telechat_{other}"):
                    torch_to_ms(source, tmp_path / "wrong", model_name=f"telechat_{other}")
        with pytest.raises(InputError, match="model_name must be one of .* not telechat_1b"):
            torch_to_ms(source, tmp_path / "wrong", model_name="telechat_1b")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("model", MODELS)
def test_wrong_tensors_are_listed_before_anything_is_written(tmp_path, make_official, write_official, model):
    config, state = make_official(model)
    norm = next(name for name in state if name.endswith("ln_f.weight"))
    last = list(state)[-2]
    state = {**state, "surplus.weight": torch.zeros(2), norm: torch.zeros(5)}
    embedding = state.pop(next(iter(state)))
    assert embedding.shape == (56, 48) and last in state
    source = write_official(config, state, shards=2)
    with pytest.raises(InputError) as error:
        torch_to_ms(source, tmp_path / "ms")
    message = str(error.value)
    assert "1 missing: " in message and ("word_embeddings.weight" in message or "wte.weight" in message)
    assert "1 not expected: surplus.weight" in message and f"{norm} is (5,) and must be (48,)" in message
    assert not (tmp_path / "ms").exists()


def test_checkpoint_of_another_size(tmp_path, make_official, write_official):
    config, state = make_official("12b")
    config["n_layer"] = 3
    with pytest.raises(InputError, match="10 missing: transformer.h.2.input_layernorm.weight, "):
        torch_to_ms(write_official(config, state), tmp_path / "ms")


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 0.5, 0.999])
def test_truncated_bin_is_named(tmp_path, make_official, write_official, zip_format, keep):
    source = write_official(*make_official("12b"), shards=2, zip_format=zip_format)
    path = source / "pytorch_model_00002-of-00002.bin"
    content = path.read_bytes()
    path.write_bytes(content[:int(keep * len(content)) if keep != 1 else 1])
    with pytest.raises(InputError, match="pytorch_model_00002-of-00002.bin"):
        torch_to_ms(source, tmp_path / "ms")
    assert not (tmp_path / "ms").exists()


def test_a_file_that_cannot_be_read(tmp_path, make_official, write_official):
    source = write_official(*make_official("12b"))
    (source / "pytorch_model.bin").unlink()
    (source / "pytorch_model.bin").mkdir()
    with pytest.raises(InputError, match=r"pytorch_model\.bin cannot be read \(Is a directory\)"):
        torch_to_ms(source, tmp_path / "ms")


class Unknown:
    """A class that weights_only must not load."""


@pytest.mark.parametrize("content, message", [
    ([torch.zeros(2)], "must hold a dictionary of tensors"),
    ({"model": {"a": torch.zeros(2)}}, "must hold a dictionary of tensors"),
    ({"a": Unknown()}, "is not a whole torch file of plain tensors"),
])
def test_files_of_other_content(tmp_path, make_official, write_official, content, message):
    source = write_official(*make_official("12b"))
    torch.save(content, source / "pytorch_model.bin")
    with pytest.raises(InputError, match=f"pytorch_model.bin {message}"):
        torch_to_ms(source, tmp_path / "ms")


def test_dtypes_that_are_no_weights(tmp_path, make_official, write_official):
    config, state = make_official("12b")
    state["lm_head.weight"] = torch.zeros(56, 48, dtype=torch.int8)
    with pytest.raises(InputError, match="lm_head.weight is int8"):
        torch_to_ms(write_official(config, state), tmp_path / "ms")


def test_absent_and_same_directories(tmp_path, make_official, write_official):
    with pytest.raises(InputError, match="nowhere is not a directory"):
        torch_to_ms(tmp_path / "nowhere", tmp_path / "ms")
    with pytest.raises(InputError, match="nowhere is not a directory"):
        ms_to_torch(tmp_path / "nowhere", tmp_path / "back")
    source = write_official(*make_official("12b"))
    (tmp_path / "link").symlink_to(source)
    before = sorted(os.listdir(source))
    for target in (source, tmp_path / "link", f"{source}/../official/"):
        with pytest.raises(InputError, match="is both input and output"):
            torch_to_ms(source, target)
    assert sorted(os.listdir(source)) == before
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"holds neither pytorch_model\*.bin nor model\*.safetensors"):
        torch_to_ms(source, tmp_path / "ms")
    (source / "config.json").unlink()
    with pytest.raises(InputError, match="config.json cannot be read"):
        torch_to_ms(source, tmp_path / "ms")
    assert not (tmp_path / "ms").exists()


def test_without_torch(tmp_path, make_official, write_official, monkeypatch):
    source = write_official(*make_official("12b"))
    torch_to_ms(source, tmp_path / "ms")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="pip install torch.*extra `convert`"):
        torch_to_ms(source, tmp_path / "new")
    with pytest.raises(InputError, match="pip install torch.*extra `convert`"):
        ms_to_torch(tmp_path / "ms", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    ms_to_torch(tmp_path / "ms", tmp_path / "back", format="safetensors")  # needs no torch
    assert (tmp_path / "back/model.safetensors").exists()


def test_unknown_format_and_dtype(tmp_path, make_official, write_official):
    source = write_official(*make_official("12b"))
    with pytest.raises(InputError, match="dtype must be one of float32, float16, bfloat16, not int8"):
        torch_to_ms(source, tmp_path / "ms", dtype="int8")
    with pytest.raises(InputError, match='format must be "bin" or "safetensors"'):
        ms_to_torch(source, tmp_path / "back", format="gguf")


def test_full_disk_leaves_nothing(tmp_path, make_official, write_official):
    """A limit on the size of files stands for the full disk."""
    source = write_official(*make_official("12b"))
    torch_to_ms(source, tmp_path / "ms")
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from telechat.checkpoint.convert import ms_to_torch, torch_to_ms
from telechat.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
for convert in (lambda: torch_to_ms("official", "new"), lambda: ms_to_torch("ms", "new"),
                lambda: ms_to_torch("ms", "new", format="safetensors")):
    try:
        convert()
    except InputError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.splitlines() == 3 * [
        "new cannot be written (File too large); free some space or give another directory"], result.stderr
    assert not (tmp_path / "new").exists()
