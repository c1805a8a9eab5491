"""Steps are captured on a card, as a rule the pretended one."""

from __future__ import annotations

from tests.card.conftest import without_onednn

__all__ = ["without_onednn"]
