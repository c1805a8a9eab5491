"""What approximate gradients cost in accuracy and save in memory, for docs/APPROXIMATE.md."""
