"""In which tiles the entries of a gradient lie, and which way to them is the cheapest."""
