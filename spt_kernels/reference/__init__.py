"""Plain eager PyTorch for every op, in the fewest lines that are obviously right: the specification."""
