"""mbridge_prune: structured pruning of Megatron-core language models through Megatron-Bridge."""

import os
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore", message="The pynvml package is deprecated", category=FutureWarning)

from mbridge_prune import reference  # noqa: E402

if reference.enable():  # before anything imports Megatron
    # Megatron's notices about packages whose places the reference room has just taken.
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed.*", category=UserWarning)

from mbridge_prune import mcore_minitron  # noqa: E402
from mbridge_prune.bridge.export import export_hf, verify_hf  # noqa: E402
from mbridge_prune.bridge.load import load_mbridge_model_from_hf  # noqa: E402
from mbridge_prune.bridge.megatron import load_mbridge_model_from_megatron  # noqa: E402
from mbridge_prune.calibration.loop import CalibrationLoop, get_hf_mbridge_calibration_loop  # noqa: E402
from mbridge_prune.errors import UserError  # noqa: E402
from mbridge_prune.heterogeneous.saved import save  # noqa: E402
from mbridge_prune.huggingface import gradnas  # noqa: E402
from mbridge_prune.huggingface.pretrained import from_pretrained  # noqa: E402
from mbridge_prune.plan import Plan  # noqa: E402
from mbridge_prune.pruning import prune, restore, score  # noqa: E402
from mbridge_prune.vision import fastnas  # noqa: E402

__all__ = [
    "CalibrationLoop",
    "Plan",
    "UserError",
    "export_hf",
    "fastnas",
    "from_pretrained",
    "get_hf_mbridge_calibration_loop",
    "gradnas",
    "load_mbridge_model_from_hf",
    "load_mbridge_model_from_megatron",
    "mcore_minitron",
    "prune",
    "restore",
    "save",
    "score",
    "verify_hf",
]
