"""What Prometheus reads: counters, and histograms whose buckets hold what was observed up to their bounds."""

import pytest

from telechat.parallel.mesh import Mesh
from telechat.serving.metrics import Metrics
from telechat.serving.service import Service
from tests.serving.conftest import CountingEngine, choice, finish

SECONDS = "0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 30 60 120 300 600 +Inf".split()
SIZES = "1 2 4 8 16 32 64 128 +Inf".split()


@pytest.mark.parametrize("name, bounds, observed, counts", [
    ("batch_size", SIZES, (1, 2, 3, 64, 65, 128, 129), [1, 2, 3, 3, 3, 3, 4, 6, 7]),
    ("request_seconds", SECONDS, (0.005, 0.1, 0.11, 2.5, 600.0, 601.0), [1, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 5, 6]),
])
def test_a_bucket_counts_all_up_to_its_bound(name, bounds, observed, counts):
    metrics = Metrics()
    for value in observed:
        metrics.observe(name, value)
    lines = [line for line in metrics.text(0, 0).splitlines() if line.startswith(f"telechat_{name}_")]
    assert lines == [*(f'telechat_{name}_bucket{{le="{bound}"}} {count}' for bound, count in zip(bounds, counts, strict=True)),
                     f"telechat_{name}_sum {sum(observed):.6f}", f"telechat_{name}_count {len(observed)}"]


def test_counters_and_gauges():
    metrics = Metrics()
    for status in (200, 200, 404):
        metrics.request("/v1/models", status)
    metrics.tokens("prompt", 5)
    metrics.tokens("prompt", 6)
    lines = metrics.text(waiting=3, running=2).splitlines()
    for line in ('telechat_requests_total{path="/v1/models",status="200"} 2', "telechat_waiting_sequences 3",
                 'telechat_requests_total{path="/v1/models",status="404"} 1', "telechat_running_sequences 2",
                 "telechat_prompt_tokens_total 11", "telechat_completion_tokens_total 0"):
        assert line in lines


def test_metrics_are_in_the_text_form_of_prometheus(service):
    service.submit([choice([1], 3)])
    finish(service)
    service.metrics.request("/v1/completions", 200)
    service.metrics.tokens("prompt", 1)
    lines = service.metrics.text(waiting=4, running=0).splitlines()
    for line in ('telechat_requests_total{path="/v1/completions",status="200"} 1', "telechat_prompt_tokens_total 1",
                 "telechat_completion_tokens_total 3", "telechat_waiting_sequences 4",
                 'telechat_batch_size_bucket{le="1"} 2', 'telechat_batch_size_bucket{le="+Inf"} 2',
                 "telechat_batch_size_sum 2.000000", "telechat_batch_size_count 2",
                 "telechat_time_to_first_token_seconds_count 1", "# TYPE telechat_request_seconds histogram"):
        assert line in lines


def test_metrics_count_what_the_cache_held_and_gave_up():
    """Of four blocks of 4 tokens a sequence of 9 and 3 takes three, all of them known: the second sequence takes the free one
    and two of these, and the first one, when it comes again, finds its beginning and takes two known ones too."""
    service = Service(CountingEngine(slots=1, length=16, blocks=4), Mesh.single().world, Metrics())
    for first in (10, 30, 10):
        service.submit([choice([first] * 9, 3)])
    finish(service)
    lines = service.metrics.text(waiting=0, running=0).splitlines()
    for line in ("telechat_prefilled_tokens_total 23", "telechat_prefix_cache_hit_tokens_total 4",
                 "telechat_prefix_cache_evictions_total 4", "telechat_preemptions_total 0", "telechat_cache_blocks 4",
                 "telechat_cache_blocks_free 4", "# TYPE telechat_prefix_cache_evictions_total counter"):
        assert line in lines, [line for line in lines if "cache" in line or "prefilled" in line]
