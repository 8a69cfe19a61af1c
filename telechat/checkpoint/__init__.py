"""Checkpoints: names and shapes, reading, writing, and conversion from and to other layouts."""
