"""Distillation of a pruned model from its parent, in Megatron-Bridge's own training loop.

The loop, the optimizer, the schedule, the checkpoints and the loggers are Bridge's; the pair of models
(`pair.py`), the forward step (`step.py`) and the loss (`divergence.py`) are ours.
"""
