"""The slice table: axes, layouts, rows, wrappers, and what reads them (sort, select, shrink, count)."""

from mbridge_prune.dynamic.axis import Axis, Sizes
from mbridge_prune.dynamic.count import Counter, Shape, shapes
from mbridge_prune.dynamic.layout import Concat, Fixed, Layout, OneGroup, PerGroup, Repeat, Scattered, Units
from mbridge_prune.dynamic.module import DynamicModule, Scope, ignores, registered, wraps
from mbridge_prune.dynamic.slices import Consumer, Cost, Follow, Gain, Probe, Reading, Renorm, Slice, Unit
from mbridge_prune.dynamic.stack import Layers, Modules, Pattern, Stack, Tensors
from mbridge_prune.dynamic.table import DEPTH, Entry, SliceTable
from mbridge_prune.dynamic.transform import select, shrink, sort

__all__ = [
    "DEPTH",
    "Axis",
    "Concat", "Consumer", "Cost",
    "Counter",
    "DynamicModule",
    "Entry",
    "Fixed",
    "Follow", "Gain",
    "Layers",
    "Layout",
    "Modules",
    "OneGroup",
    "Pattern",
    "PerGroup",
    "Probe",
    "Reading",
    "Renorm",
    "Repeat",
    "Scattered",
    "Scope",
    "Shape",
    "Sizes",
    "Slice",
    "SliceTable",
    "Stack",
    "Tensors",
    "Unit",
    "Units",
    "ignores",
    "registered",
    "select",
    "shapes",
    "shrink",
    "sort",
    "wraps",
]  # fmt: skip
