"""Plain eager PyTorch for every op, in the fewest obviously right lines: the specification."""
