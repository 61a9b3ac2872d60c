"""The slice table: axes, layouts, rows, wrappers, and what reads them (sort, select, shrink, count)."""

from mbridge_prune.dynamic.axis import Axis
from mbridge_prune.dynamic.count import Counter, Shape, shapes
from mbridge_prune.dynamic.layout import Concat, Fixed, Layout, PerGroup, Repeat, Units
from mbridge_prune.dynamic.module import DynamicModule, Scope, registered, wraps
from mbridge_prune.dynamic.slices import Follow, Probe, Slice
from mbridge_prune.dynamic.table import DEPTH, Entry, Layers, SliceTable
from mbridge_prune.dynamic.transform import select, shrink, sort

__all__ = [
    "DEPTH", "Axis", "Concat", "Counter", "DynamicModule", "Entry", "Fixed", "Follow", "Layers",
    "Layout", "PerGroup", "Probe", "Repeat", "Scope", "Shape", "Slice", "SliceTable", "Units",
    "registered", "select", "shapes", "shrink", "sort", "wraps",
]  # fmt: skip
