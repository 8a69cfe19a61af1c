"""The library measured side by side with plain torch: python -m benchmarks."""
