"""One run: what its job comes to here, what it tells of itself, and found again on disk."""
