"""The file of an evaluation's answers: what is taken up, and what a crash cut short."""

from telechat.evaluation.run import Results
from telechat.parallel.mesh import Mesh


def test_what_a_crash_cut_short_is_dropped_and_all_else_kept(tmp_path):
    identity, world = {"task": "ceval"}, Mesh.single().world
    results = Results(tmp_path, identity, world)
    results.add("a/1", answer="B")
    results.add("a/2", answer="汉")
    results.close()
    whole = (tmp_path / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").write_bytes(whole + '{"key": "a/3", "answer": "汉'.encode()[:-1])
    again = Results(tmp_path, identity, world)
    assert list(again.records) == ["a/1", "a/2"] and (tmp_path / "answers.jsonl").read_bytes() == whole
    again.add("a/3", answer="C")
    again.close()
    assert (tmp_path / "answers.jsonl").read_bytes() == whole + b'{"key": "a/3", "answer": "C"}\n'
