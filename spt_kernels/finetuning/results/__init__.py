"""What comes of runs: pictures, comparisons, evaluation and prediction by what they saved."""
