"""What makes a training step fit into a given memory."""

from .card import CARDS, Card, card_named
from .fit import Fitted, Fitting

__all__ = ["CARDS", "Card", "Fitted", "Fitting", "card_named"]
