"""Training by the operators: how many threads there are changes nothing."""

import numpy as np
import pytest

from telechat import TeleChat, TrainConfig, Trainer
from telechat.nn.cpu.build import default_threads, load_library
from tests.test_model import small_config

if load_library() is None:
    pytest.skip("needs a C++ compiler, which is not here", allow_module_level=True)


def trace(threads):
    """Losses and gradient norms of four steps, and the weights behind them."""
    load_library().set_thread_count(threads)
    model = TeleChat(small_config(initializer_range=0.2, hidden_dropout=0.1, attention_dropout=0.1), kernels="cpu")
    trainer = Trainer(model, TrainConfig(learning_rate=1e-2))
    ids = np.random.default_rng(0).integers(4, 96, (4, 3, 71))
    steps = [trainer.train_step(batch, batch) for batch in ids]
    return (np.array([[step.loss, step.grad_norm] for step in steps]),
            np.concatenate([parameter.asnumpy().ravel() for parameter in model.get_parameters()]))


def test_the_trace_does_not_depend_on_the_number_of_threads():
    try:
        figures, weights = trace(1)
        for threads in (2, 3):
            others, other_weights = trace(threads)
            np.testing.assert_allclose(others, figures, rtol=1e-6)
            assert np.abs(other_weights - weights).max() <= 1e-6
    finally:
        load_library().set_thread_count(default_threads())


@pytest.mark.parametrize("value, processes, threads", [("1", "1", 1), ("3", "4", 3), ("2,1", "1", 2)])
def test_omp_num_threads_is_honoured(monkeypatch, value, processes, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setenv("MS_WORKER_NUM", processes)
    assert default_threads() == threads


def test_processes_of_a_job_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(16)), raising=False)
    monkeypatch.setenv("MS_WORKER_NUM", "4")
    assert default_threads() == 4
    monkeypatch.setenv("MS_WORKER_NUM", "64")
    assert default_threads() == 1
