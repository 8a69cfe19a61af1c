"""What a SentencePiece model's bytes say and its processor does not tell, and changes made in those bytes.

A ``tokenizer.model`` is a message of protocol buffers
(https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto,
https://protobuf.dev/programming-guides/encoding/). The protobuf package would read and write it, but ``import
mindspore`` makes that package take its Python implementation, which needs 1.5 s for 120,000 pieces, each way.
"""

# ModelProto
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
# ModelProto.SentencePiece and the values of its type
_TYPE = 3
_CONTROL, _USER_DEFINED = 3, 4
# TrainerSpec and a value of its model_type
_MODEL_TYPE, _BPE = 3, 2
# NormalizerSpec
_CHARACTERS_MAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_SPACES = 2, 3, 4

# Wire types; a field's key is its number and, in the lowest three bits, one of these.
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def user_defined(data):
    """The pieces of type USER_DEFINED.

    Args:
        data: bytes, a model that a processor has taken.

    Returns:
        {id: position in ``data`` of the byte that is its type}

    Raises:
        ValueError: a field of a kind that SentencePiece does not write.
    """
    found, index = {}, 0
    written = bytes([_TYPE << 3 | _VARINT, _USER_DEFINED])
    for number, start, end in _fields(data, 0, len(data)):
        if number != _PIECES:
            continue
        if data.find(written, start, end) >= 0:  # or it is a part of the spelling or of the score
            for inner, position, _ in _fields(data, start, end):
                if inner == _TYPE and data[position] == _USER_DEFINED:
                    found[index] = position
        index += 1
    return found


def made_control(data, positions):
    """``data`` with the types at ``positions``, of `user_defined`, changed to CONTROL."""
    data = bytearray(data)
    for position in positions:
        data[position] = _CONTROL
    return bytes(data)


def without_dummy_prefix(data):
    """``data`` with the normaliser's add_dummy_prefix off: of a field given twice, the later one counts."""
    spec = bytes([_ADD_DUMMY_PREFIX << 3 | _VARINT, False])
    return data + bytes([_NORMALIZER << 3 | _LENGTH, len(spec)]) + spec


def is_plain_bpe(data):
    """Whether a model is BPE and does nothing to a text but put the dummy prefix in front."""
    kind, has_map, prefix, removes = None, False, True, True  # of what is left out the message's defaults
    for number, start, end in _fields(data, 0, len(data)):
        if number == _TRAINER:
            kind = next((data[at] for inner, at, _ in _fields(data, start, end) if inner == _MODEL_TYPE), kind)
        elif number == _NORMALIZER:
            for inner, at, stop in _fields(data, start, end):
                if inner == _CHARACTERS_MAP:
                    has_map = stop > at
                elif inner == _ADD_DUMMY_PREFIX:
                    prefix = bool(data[at])
                elif inner == _REMOVE_EXTRA_SPACES:
                    removes = bool(data[at])
    return kind == _BPE and not has_map and prefix and not removes


def _fields(data, at, end):
    """(number, start, end) of each field's value in ``data[at:end]``."""
    while at < end:
        # Almost all are of one byte, and there are hundreds of thousands of them: no call for these.
        key, at = _varint(data, at) if data[at] & 0x80 else (data[at], at + 1)
        kind = key & 7
        start = at
        if kind == _LENGTH:
            size, start = _varint(data, at) if data[at] & 0x80 else (data[at], at + 1)
            at = start + size
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        yield key >> 3, start, at


def _varint(data, at):
    """(value, where it ends) of a number in groups of seven bits, the lowest first."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7f) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
