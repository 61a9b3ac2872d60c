"""Every family cut along every hparam it has: counts, tensors, configs, logits, and what Megatron rebuilds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import (
    CASES, EXPERT_NAMES, FAMILIES, TOLERANCE, cuts, full_sizes, load, load_hf, run_through, source_config, write_source,
)  # fmt: skip
from models import cut, difference, run, run_hf, tokens
from references import Kept, sliced_state
from safetensors.torch import load_file
from transformers import PreTrainedModel

import mbridge_prune as mbp

IDS = tokens(seed=11)
