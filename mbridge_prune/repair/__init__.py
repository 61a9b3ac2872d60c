"""Closed-form weight updates for a cut: every shape stays, nothing is trained."""

from mbridge_prune.repair.run import repair

__all__ = ["repair"]
