"""Benchmarks of many tasks: where their images are, and a run for each method, task and seed."""

from __future__ import annotations

from .task import BenchmarkTask

__all__ = ["BenchmarkTask"]
