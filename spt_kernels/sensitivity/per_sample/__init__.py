"""Squared gradients of each sample's own loss, measured a whole batch at a time.

The model runs as it is. Its parameters tell of the calls in which they are used, and an observer is
put behind each: identity in the forward pass, and in the backward pass the place where the gradient
of the output meets the input. Calls without a parameter, and the backward pass, run untouched.
"""
