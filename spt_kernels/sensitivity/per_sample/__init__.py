"""Squared gradients of each sample's own loss, measured a whole batch at a time.

The model runs as it is. A `TorchFunctionMode` recognizes the calls in which it uses its parameters
and puts an observer behind each: identity in the forward pass, and in the backward pass the place
where the gradient of the output meets the input.
"""
