"""Finding passages, and scores that can be compared whatever found them."""

from .identity import content_id, identified

__all__ = ["content_id", "identified"]
