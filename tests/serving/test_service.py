"""The loop: who joins and leaves when, on an engine that counts."""

import threading

import pytest

from telechat.parallel.mesh import Mesh
from telechat.serving.metrics import Metrics
from telechat.serving.api_error import APIError
from telechat.serving.service import Service
from tests.serving.conftest import CountingEngine, choice, finish


def collect(item):
    """The text and reason that a choice got."""
    text = ""
    while True:
        _, piece, reason, *_ = item.listener.get(timeout=10)
        text += piece
        if reason:
            return text, reason


def test_more_sequences_than_slots_are_all_answered(service, engine):
    items = [choice([start], count) for start, count in ((1, 3), (10, 5), (20, 1), (30, 4))]
    service.submit(items[:2])
    service.submit(items[2:])
    finish(service)
    assert [collect(item) for item in items] == [
        ("2 3 4 ", "length"), ("11 12 13 14 15 ", "length"), ("21 ", "length"), ("31 32 33 34 ", "length")]
    # Two slots: after two tokens the first has left, and the third is answered by its prefill alone; the fourth joins
    # a token later and has three to go.
    assert engine.decodes == 2 + 1 + 3


def test_a_long_prompt_is_read_between_the_tokens_of_others():
    """Each part of it, of 8 tokens at most, comes between two tokens of the answer that runs; a short one fits beside."""
    engine = CountingEngine(slots=3, length=64)
    service = Service(engine, Mesh.single().world, Metrics(), prefill_chunk=8)
    service.deliver = lambda events: [event.choice.listener.put(event) for event in events]
    runs, long, short = choice([1], 9), choice([20] * 27, 2), choice([40] * 3, 2)
    calls, prefill, decode = [], engine.prefill, engine.decode

    def read(slots, prompts, starts):
        calls.append([len(prompt) for prompt in prompts])
        return prefill(slots, prompts, starts)

    def go_on(slots, tokens, positions):
        calls.append(len(slots))
        if len(calls) == 2:
            service.stopping = False
            service.submit([long, short])
            service.stopping = True
        return decode(slots, tokens, positions)

    engine.prefill, engine.decode = read, go_on
    service.submit([runs])
    finish(service)
    assert [collect(item)[0] for item in (long, short)] == ["21 22 ", "41 42 "]
    assert calls[:10] == [[1], 1, [8], 1, [8], 1, [8], 1, [3, 3], 3]


def test_stop_tokens_and_stop_strings_and_the_end_of_the_cache(service):
    items = [choice([1], 9, stop_ids=(4,)), choice([1], 9, stop_at=4), choice([1] * 30, 9)]
    service.submit(items)
    finish(service)
    assert [collect(item) for item in items] == [("2 3 ", "stop"), ("2 3 ", "stop"), ("2 3 ", "length")]
    assert service.running == service.waiting == 0


def test_the_queue_has_a_limit(service):
    service.submit([choice([1], 1) for _ in range(5)])  # two slots and three that wait
    with pytest.raises(APIError) as refused:
        service.submit([choice([1], 1)])
    assert refused.value.status == 429
    finish(service)
    with pytest.raises(APIError) as refused:
        service.submit([choice([1], 1)])
    assert refused.value.status == 503


def test_the_queue_has_room_beside_what_runs(service, engine):
    """Two slots and three places: while two run, three wait and no fourth."""
    service.submit([choice([1], 4), choice([1], 4)])
    decode, more = engine.decode, [choice([1], 1) for _ in range(4)]

    def submit_at_second(slots, tokens, positions):
        if engine.decodes == 1:
            assert service.running == 2
            service.stopping = False
            with pytest.raises(APIError) as refused:
                service.submit(more)
            assert (refused.value.status, refused.value.code) == (429, "queue_full")
            service.submit(more[:3])
            with pytest.raises(APIError, match="^3 requests are waiting, which is as many as this server lets; try again"):
                service.submit(more[3:])
            service.stopping = True
        return decode(slots, tokens, positions)

    engine.decode = submit_at_second
    finish(service)
    assert [collect(item)[1] for item in more[:3]] == ["length"] * 3


def test_more_answers_in_one_request_than_there_are_places(service):
    with pytest.raises(APIError, match="^6 answers in one request are more than the 5 that this server takes at a time"):
        service.submit([choice([1], 1) for _ in range(6)])


def test_batch_sizes_are_compiled_while_nobody_waits(service, engine, monkeypatch):
    monkeypatch.setattr("telechat.serving.service.IDLE", 0.05)
    engine.uncompiled, compiled = [1, 2], []

    def compile(size):
        assert service.running == 0
        compiled.append(size)
        engine.uncompiled = engine.uncompiled[1:]
        service.stopping = not engine.uncompiled

    service.compile = compile
    service.submit([choice([1], 3)])
    service.run()
    assert compiled == [1, 2]


def test_deserted_is_a_service_whose_clients_have_gone(service, engine):
    items = [choice([1], 9), choice([1], 9), choice([1], 9)]
    assert service.deserted
    service.submit(items)
    assert not service.deserted
    decode, seen = engine.decode, []

    def go_at_second(slots, tokens, positions):
        if engine.decodes == 1:
            service.cancel(items[:1])
            seen.append(service.deserted)
            service.cancel(items[1:])
            seen.append(service.deserted)
        return decode(slots, tokens, positions)

    engine.decode = go_at_second
    finish(service)
    assert seen == [False, True] and engine.decodes == 2 and service.over


def test_a_cancelled_sequence_frees_its_slot_within_one_token(service, engine):
    gone, waits, queued = choice([1], 30), choice([10], 30), choice([20], 2)
    service.submit([gone, waits, queued])
    decode = engine.decode

    def cancel_at_third(slots, tokens, positions):
        if engine.decodes == 2:
            service.cancel([gone])
        return decode(slots, tokens, positions)

    engine.decode = cancel_at_third
    finish(service)
    assert collect(queued) == ("21 22 ", "length")
    assert collect(waits)[0].split() == [str(token) for token in range(11, 41)]
    # `gone` had the tokens of its prefill and of two decodes; the one after which it left went nowhere.
    assert [event[1] for event in gone.listener.queue] == ["2 ", "3 ", "4 "]
    assert engine.decodes == 29
    assert "telechat_completion_tokens_total 35" in service.metrics.text(0, 0).splitlines(), "3 of them for nobody"


def test_a_cancelled_sequence_that_waits_is_never_answered(service):
    items = [choice([1], 2), choice([2], 2), choice([3], 2)]
    service.submit(items)
    service.cancel(items[2:])
    finish(service)
    assert items[2].listener.empty()


def test_a_sequence_that_is_cancelled_while_it_is_put_back_leaves_nothing():
    """Four blocks of 4 tokens: the second one has to make room for the first, and its client goes meanwhile."""
    engine = CountingEngine(slots=2, length=16, blocks=4, block_size=4)
    service = Service(engine, Mesh.single().world, Metrics())
    service.deliver = lambda events: [event.choice.listener.put(event) for event in events]
    stays, gone, later = choice([1, 1, 1], 13), choice([9] * 7, 9), choice([30], 3)
    service.submit([stays, gone])
    decode = engine.decode

    def cancel_when_put_back(slots, tokens, positions):
        if service._batch.preemptions == 1 and gone.key not in service._leaving and len(slots) == 1:
            service.cancel([gone])
            service.stopping = False
            service.submit([later])
            service.stopping = True
            engine.decode = decode
        return decode(slots, tokens, positions)

    engine.decode = cancel_when_put_back
    finish(service)
    assert collect(stays)[0].split() == [str(token) for token in range(2, 15)] and collect(later) == ("31 32 33 ", "length")
    assert all(event.reason is None for event in gone.listener.queue) and service._batch.preemptions == 1
    assert engine.available == 4 and service.running == len(service._batch) == 0


def test_the_time_limit_ends_what_runs_and_what_waits(service, engine):
    items = [choice([1], 30), choice([2], 30), choice([3], 30)]
    service.submit(items)
    decode = engine.decode

    def late(slots, tokens, positions):
        for item in items[1:]:
            item.deadline = 0.0
        return decode(slots, tokens, positions)

    engine.decode = late
    finish(service)
    assert [collect(item)[1] for item in items] == ["length", "timeout", "timeout"]


def test_a_second_signal_ends_all_at_once(service, engine):
    items = [choice([1], 30), choice([2], 30)]
    service.submit(items)
    service.hurry()
    service.run()
    assert [collect(item)[1] for item in items] == ["timeout", "timeout"] and engine.decodes == 0


def test_a_failure_is_told_to_everyone_and_raised(service, engine):
    engine.fail_at = 2
    items = [choice([1], 30), choice([2], 30), choice([3], 30)]
    service.submit(items)
    with pytest.raises(MemoryError):
        service.run()
    assert [collect(item)[1] for item in items] == ["failure"] * 3
    with pytest.raises(APIError):
        service.submit([choice([1], 1)])


def test_an_idle_loop_wakes_for_a_request(service):
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        item = choice([1], 2)
        service.submit([item])
        assert collect(item) == ("2 3 ", "length")
    finally:
        service.stopping = True
        thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("uncompiled, seconds", [([], 5.0), ([2], 1.0)])
def test_an_idle_loop_compiles_after_a_second_and_else_only_says_that_it_is_there(monkeypatch, service, uncompiled, seconds):
    clock = [100.0]
    monkeypatch.setattr("telechat.serving.service.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(service._news, "wait", lambda glance: clock.append(clock.pop() + glance))
    service.engine.uncompiled = uncompiled
    plan = service._plan()
    assert plan.compile == (uncompiled or [None])[0] and clock[0] == pytest.approx(100 + seconds)


def test_warm_up_runs_every_size_that_fits():
    engine = CountingEngine(slots=3, length=100)
    engine.uncompiled = [1, 2, 3]
    sizes, batches, decode = [], [], engine.decode
    engine.prefill = lambda slots, prompts: sizes.extend(map(len, prompts))
    engine.decode = lambda slots, *rest: batches.append(len(slots)) or decode(slots, *rest)
    Service(engine, Mesh.single().world, Metrics()).warm_up()
    assert sizes == [32, 64] and sorted(batches) == [1, 3]
