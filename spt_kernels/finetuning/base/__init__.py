"""The pre-trained model that is fine-tuned: its weights, from wherever, in timm's architecture."""
