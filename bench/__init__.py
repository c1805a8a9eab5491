"""Benches: one file per op, whole-model costs, and the peers, each beside what it replaces."""
