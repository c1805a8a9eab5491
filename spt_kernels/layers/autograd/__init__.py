"""The functions of tuned layers: what they keep for the backward, and the products they do."""
