"""What makes a training step fit into a given memory."""

from .card import CARDS, Card, card_named

__all__ = ["CARDS", "Card", "card_named"]
