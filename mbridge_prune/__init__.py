"""mbridge_prune: structured pruning of Megatron-core language models through Megatron-Bridge."""

from mbridge_prune import reference

reference.enable()  # before anything imports Megatron

from mbridge_prune import mcore_minitron  # noqa: E402
from mbridge_prune.bridge.export import export_hf, verify_hf  # noqa: E402
from mbridge_prune.bridge.load import load_mbridge_model_from_hf  # noqa: E402
from mbridge_prune.calibration.loop import CalibrationLoop, get_hf_mbridge_calibration_loop  # noqa: E402
from mbridge_prune.errors import UserError  # noqa: E402
from mbridge_prune.mcore_minitron import Plan  # noqa: E402
from mbridge_prune.pruning import prune  # noqa: E402

__all__ = [
    "CalibrationLoop",
    "Plan",
    "UserError",
    "export_hf",
    "get_hf_mbridge_calibration_loop",
    "load_mbridge_model_from_hf",
    "mcore_minitron",
    "prune",
    "verify_hf",
]
