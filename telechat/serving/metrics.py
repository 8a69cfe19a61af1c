"""Counters and histograms in the text form that Prometheus reads.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import collections
import threading

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Histogram:
    """Counts of observed values up to each bound."""

    def __init__(self, bounds):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value):
        """Count one value."""
        place = next((i for i, bound in enumerate(self.bounds) if value <= bound), len(self.bounds))
        self.counts[place] += 1
        self.sum += value

    def lines(self, name):
        """Its lines of the text form."""
        total = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """What a server counts; safe to use from several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._requests = collections.Counter()  # (path, status) → count
        self._tokens = collections.Counter()  # "prompt" or "completion" → count
        self._cache = {}  # name → (value, meaning), as of the last step
        self._histograms = {
            "time_to_first_token_seconds": (Histogram(SECONDS), "From a request's arrival to its first token."),
            "request_seconds": (Histogram(SECONDS), "From a request's arrival to the end of its answer."),
            "decode_seconds": (Histogram(SECONDS), "One step of decoding for every sequence of the batch."),
            "batch_size": (Histogram(SIZES), "Sequences advanced together by one decoding step."),
        }

    def request(self, path, status):
        """Count a request that was answered with ``status``."""
        with self._lock:
            self._requests[path, status] += 1

    def tokens(self, kind, count):
        """Count tokens, ``kind`` "prompt" or "completion"."""
        with self._lock:
            self._tokens[kind] += count

    def observe(self, name, value):
        """Add a value to the histogram called ``name``."""
        with self._lock:
            self._histograms[name][0].observe(value)

    def cache(self, engine, batch):
        """Take over what the cache and the batch have counted so far."""
        table = engine.table
        with self._lock:
            self._cache = {
                "prefilled_tokens_total": (table.misses, "Tokens of prompts that were computed."),
                "prefix_cache_hit_tokens_total": (table.hits, "Tokens of prompts that the cache held already."),
                "prefix_cache_evictions_total": (table.pool.evictions, "Blocks with known tokens, given up for others."),
                "preemptions_total": (batch.preemptions, "Sequences put back to wait because the cache was full."),
                "guessed_tokens_total": (batch.guessed, "Tokens that were guessed ahead (--speculate)."),
                "guessed_right_tokens_total": (batch.right, "Those of them that came to be."),
                "cache_blocks": (table.pool.count, f"Blocks of the cache, {table.block_size} tokens each."),
                "cache_blocks_free": (table.pool.available, "Blocks that no running sequence holds."),
                "cache_blocks_known": (table.pool.remembered, "Full blocks that sequences that begin alike can share."),
            }

    def text(self, waiting, running):
        """Everything as Prometheus reads it; ``waiting`` and ``running`` are counts of sequences now."""
        with self._lock:
            lines = ["# HELP telechat_requests_total Requests by path and status.",
                     "# TYPE telechat_requests_total counter"]
            lines += [f'telechat_requests_total{{path="{path}",status="{status}"}} {count}'
                      for (path, status), count in sorted(self._requests.items())]
            for kind in ("prompt", "completion"):
                name = f"telechat_{kind}_tokens_total"
                lines += [f"# HELP {name} Tokens of {kind}s.", f"# TYPE {name} counter", f"{name} {self._tokens[kind]}"]
            for name, value, meaning in (("waiting", waiting, "in the queue"), ("running", running, "in the batch")):
                lines += [f"# HELP telechat_{name}_sequences Sequences {meaning}.",
                          f"# TYPE telechat_{name}_sequences gauge", f"telechat_{name}_sequences {value}"]
            for name, (value, meaning) in self._cache.items():
                lines += [f"# HELP telechat_{name} {meaning}",
                          f"# TYPE telechat_{name} {'counter' if name.endswith('_total') else 'gauge'}",
                          f"telechat_{name} {value}"]
            for name, (histogram, meaning) in self._histograms.items():
                lines += [f"# HELP telechat_{name} {meaning}", f"# TYPE telechat_{name} histogram"]
                lines += histogram.lines(f"telechat_{name}")
        return "\n".join(lines) + "\n"
