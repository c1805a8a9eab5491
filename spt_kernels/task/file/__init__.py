"""The task file of one tuned model: `format` is the layout, the others what it is made of."""
