"""What `torch.compile` makes of a training step for a card, told without one."""
