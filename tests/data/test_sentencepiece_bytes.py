"""What is read from and changed in a SentencePiece model's bytes, against protobuf."""

import pytest
from sentencepiece import sentencepiece_model_pb2

from telechat.data.sentencepiece_bytes import made_control, user_defined, without_dummy_prefix

PIECE = sentencepiece_model_pb2.ModelProto.SentencePiece
NORMAL, CONTROL, USER_DEFINED = PIECE.NORMAL, PIECE.CONTROL, PIECE.USER_DEFINED


def parse(data):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(data)
    return proto


def user_defined_by_protobuf(proto):
    return [index for index, piece in enumerate(proto.pieces) if piece.type == USER_DEFINED]


def synthetic():
    """Pieces that mislead one who looks at bytes alone, between the other fields of a model."""
    proto = sentencepiece_model_pb2.ModelProto()
    for spelling, score, kind in [("a", -1.0, NORMAL), ("<x>", None, USER_DEFINED), ("\x18\x04", 0.0, CONTROL),
                                  ("\x18\x04", -2.5, USER_DEFINED), ("long" * 40, None, USER_DEFINED),
                                  ("long" * 4000, -1.0, USER_DEFINED), ("", None, None), ("<no>", -3.0, NORMAL)]:
        piece = proto.pieces.add(piece=spelling)
        if score is not None:
            piece.score = score
        if kind is not None:
            piece.type = kind
    # The bytes of this score are those of a type.
    proto.pieces.add(piece="score").MergeFromString(b"\x15\x18\x04\x18\x04")
    proto.trainer_spec.vocab_size = 1 << 30
    proto.trainer_spec.model_prefix = "m" * 300
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    # Fields that no version of ours knows: 64 bits wide, and a number above 15, whose key takes two bytes.
    return b"\xc9\x3e" + b"\x0a\x01\x18\x04" * 2 + b"\xca\x3e\x03abc" + proto.SerializeToString() + b"\x12\x02\x20\x05"


@pytest.fixture(params=["synthetic", "samples", "12b", "52b"])
def model(request):
    if request.param == "synthetic":
        return synthetic()
    if request.param == "samples":
        return (request.getfixturevalue("samples") / "tokenizer.model").read_bytes()
    return (request.getfixturevalue("shared") / f"data/telechat_{request.param}.tokenizer.model").read_bytes()


def test_user_defined_pieces_are_those_that_protobuf_finds(model):
    found = user_defined(model)
    assert list(found) == user_defined_by_protobuf(parse(model)) != []
    assert {model[position] for position in found.values()} == {USER_DEFINED}


def test_only_the_types_asked_for_change(model):
    found = user_defined(model)
    chosen = list(found)[::2]
    expected = parse(model)
    for index in chosen:
        expected.pieces[index].type = CONTROL
    assert parse(made_control(model, map(found.get, chosen))) == expected


def test_only_the_dummy_prefix_changes(model):
    expected = parse(model)
    assert expected.normalizer_spec.add_dummy_prefix
    expected.normalizer_spec.add_dummy_prefix = False
    assert parse(without_dummy_prefix(model)) == expected


def test_fields_of_no_known_kind_are_refused():
    with pytest.raises(ValueError, match="wire type 3"):
        user_defined(b"\x0b\x0c")
