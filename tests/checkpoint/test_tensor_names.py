"""Names of tensors beside those that are asked for."""

import pytest

from telechat.checkpoint import layout, tensor_names
from telechat.errors import InputError
from tests.test_model import small_config


def test_check_lists_every_kind_by_name():
    expected = {"a": (2, 3), "b": (4,), "c": (5,)}
    tensor_names.check_tensors({"a": [2, 3], "b": (4,), "c": (5,)}, expected, "DIR")
    with pytest.raises(InputError) as error:
        tensor_names.check_tensors({"a": (3, 2), "c": (5,), "d": (1,)}, expected, "DIR")
    message = str(error.value)
    assert message.startswith("DIR ") and "\n" not in message
    assert "1 missing: b" in message and "1 not expected: d" in message
    assert "1 of a wrong shape: a is (3, 2) and must be (2, 3)" in message


def test_check_cuts_a_long_list():
    with pytest.raises(InputError) as error:
        tensor_names.check_tensors({}, {f"t{i}": (1,) for i in range(45)}, "DIR")
    assert str(error.value).endswith("; 45 missing: t0, t1, t2 and 42 more")


@pytest.mark.parametrize("names, pattern", [
    ([f"transformer.h.{layer}.mlp.up_proj.weight" for layer in range(5)], "transformer.h.*.mlp.up_proj.weight"),
    ([f"transformer.h.2.{name}" for name in "abcd"], "transformer.h.2.*"),
    ([f"transformer.h.{layer}.{name}.weight" for layer in (0, 1) for name in "ab"], "transformer.h.*.*"),
])
def test_a_long_list_ends_with_what_its_names_have_in_common(names, pattern):
    with pytest.raises(InputError) as error:
        tensor_names.check_tensors({name: (1,) for name in names}, {name: (2,) for name in names}, "DIR")
    assert str(error.value).endswith(f" and must be (2,) and {len(names) - 3} more, all {pattern}")
    with pytest.raises(InputError) as error:
        tensor_names.check_tensors({}, {name: (2,) for name in names}, "DIR")
    assert str(error.value).endswith(f"{', '.join(names[:3])} and {len(names) - 3} more, all {pattern}")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "model.", "module._orig_mod.",
                                    "_orig_mod.module.", "base_model.model.model.", "module.module.", "_forward_module.",
                                    "_fsdp_wrapped_module.module."])
def test_match_names_takes_wrappers_off(prefix):
    expected = list(layout.parameter_shapes(small_config()))
    matched = tensor_names.match_names([prefix + name for name in expected], expected)
    assert matched == {prefix + name: name for name in expected}
    assert tensor_names.describe_wrappers(matched) == prefix
    without = [name.replace("transformer.", "") for name in expected]  # as the published 7B has them
    matched = tensor_names.match_names([prefix + name for name in without], expected)
    assert list(matched.values()) == expected and tensor_names.describe_wrappers(matched) == prefix


def test_match_names_takes_wrappers_of_a_part_off():
    expected = list(layout.parameter_shapes(small_config()))
    found = [name.replace("h.1.", "h.1._orig_mod.").replace("lm_head", "module.lm_head") for name in expected]
    matched = tensor_names.match_names(found, expected)
    assert list(matched.values()) == expected and tensor_names.describe_wrappers(matched) == "_orig_mod., module."
    assert tensor_names.describe_wrappers(tensor_names.match_names(expected, expected)) is None


def test_match_names_moves_only_the_prefix():
    expected = ["transformer.h.0.x", "lm_head.weight"]
    assert tensor_names.match_names(["h.0.x", "lm_head.weight", "y"], expected) == {
        "h.0.x": "transformer.h.0.x", "lm_head.weight": "lm_head.weight", "y": "y"}
    assert tensor_names.match_names(["transformer.h.0.x"], ["h.0.x"]) == {"transformer.h.0.x": "h.0.x"}
    # A wrapper's prefix beside the bare name: surplus too, as is an unknown prefix.
    assert tensor_names.match_names(["module.lm_head.weight", "lm_head.weight"], expected)["module.lm_head.weight"] == \
        "module.lm_head.weight"
    assert tensor_names.match_names(["net.lm_head.weight"], expected) == {"net.lm_head.weight": "net.lm_head.weight"}
    # Both spellings in one file: the second is surplus, not silently the same.
    assert tensor_names.match_names(["h.0.x", "transformer.h.0.x"], expected)["h.0.x"] == "h.0.x"
