"""What comes between images and training: a measurement, a search, what fits the memory."""
