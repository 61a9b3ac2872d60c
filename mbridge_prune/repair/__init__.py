"""Closed-form weight updates for a cut: every shape stays, nothing is trained."""

from mbridge_prune.repair.room import Room
from mbridge_prune.repair.run import NO_REPAIR, Repair, repair

__all__ = ["NO_REPAIR", "Repair", "Room", "repair"]
