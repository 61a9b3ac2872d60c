"""Calibration: text sources, packing, the forward-only pipeline, the ready-made forward loop."""
