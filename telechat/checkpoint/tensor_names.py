"""The names of a file's tensors beside those that a config asks for: wrappers' prefixes taken off, differences listed."""

import re

from telechat.errors import InputError
from telechat.foreign import refuse_foreign_names

_PREFIX = "transformer."  # which the published 7B alone omits
_LISTED = 3  # names shown of each kind of mismatch
# What programs that wrap a model put in front of its parameters' names: DataParallel and DDP, torch.compile, PEFT,
# FSDP, DeepSpeed, and classes that hold the model as a field. Those of the second line may stand inside a name too.
_WRAPPERS = ("module.", "base_model.model.", "base_model.", "_forward_module.", "model.",
             "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_INNER_WRAPPERS = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def match_names(found, expected, with_prefix=True):
    """Found name → expected name, where they differ by the prefixes of wrappers alone, or by ``transformer.`` too.

    Args:
        found, expected: names.
        with_prefix: False: ``transformer.`` counts, which tells ours from a published 7B's.

    Found names that match nothing, or what another name already matches, map to themselves.
    """
    expected = set(expected)
    matched = {name: name for name in found}
    taken = set(found) & expected
    for name in found:
        if name in expected:
            continue
        for bare in _unwrapped(name):
            other = bare[len(_PREFIX):] if bare.startswith(_PREFIX) else _PREFIX + bare
            fitting = [candidate for candidate in (bare, other)[:1 + with_prefix] if candidate in expected and candidate not in taken]
            if fitting:
                matched[name] = fitting[0]
                taken.add(fitting[0])
                break
    return matched


def _unwrapped(name):
    """The name, then with one wrapper's prefix after another taken off."""
    yield name
    name = _INNER_WRAPPERS.sub("", name)
    yield name
    while prefix := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), None):
        name = name[len(prefix):]
        yield name


def describe_wrappers(matched):
    """What wrappers `match_names` took off, as text such as ``"module."``; None where there were none."""
    removed = {}
    for name, other in matched.items():
        end = name.find(other.removeprefix(_PREFIX))
        prefix = name[:end].removesuffix(_PREFIX) if end >= 0 else "".join(
            dict.fromkeys(found.group() for found in _INNER_WRAPPERS.finditer(name)))
        if prefix:
            removed[prefix] = None
    return ", ".join(removed) or None


def mismatches(found, expected):
    """(missing names, surplus names, wrong-shaped names) of `found` against `expected`, both name → shape."""
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    wrong = [name for name in expected if name in found and tuple(found[name]) != tuple(expected[name])]
    return missing, surplus, wrong


def check_tensors(found, expected, source):
    """Compare the tensors of a file with what a config asks for.

    Args:
        found, expected: name → shape.
        source: where they were found, for the message.

    Raises:
        InputError: one sentence that names the first three of each kind of difference, and what the names of all of
            a kind have in common.
    """
    missing, surplus, wrong = mismatches(found, expected)
    wrong = [f"{name} is {tuple(found[name])} and must be {tuple(expected[name])}" for name in wrong]
    parts = [f"{len(names)} {kind}: {_listing(names)}" for kind, names in
             (("missing", missing), ("not expected", surplus), ("of a wrong shape", wrong)) if names]
    if parts:
        refuse_foreign_names(source, surplus)
        raise InputError(f"{source} does not hold the tensors that its config.json asks for; "
                         + "; ".join(parts))


def _listing(names):
    more = len(names) - _LISTED
    if more <= 0:
        return ", ".join(names)
    pattern = _pattern(name.split(" ")[0] for name in names)
    return ", ".join(names[:_LISTED]) + f" and {more} more" + (f", all {pattern}" if pattern else "")


def _pattern(names):
    """What names have in common, with * for layers' numbers and for all behind the first difference; "" for nothing."""
    parts = []
    for same in zip(*(name.split(".") for name in names)):
        if len(set(same)) == 1:
            parts.append(same[0])
        elif all(part.isdigit() for part in same):
            parts.append("*")
        else:
            return ".".join([*parts, "*"]) if parts else ""
    return ".".join(parts)
