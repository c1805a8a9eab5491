"""Epochs of steps, looks at the validation images, the best of them."""
