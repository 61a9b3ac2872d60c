"""SIGTERM, or a file that appears, ends a training run behind a checkpoint."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from megatron.bridge.training.callbacks import Callback, CallbackContext

from mbridge_prune import runtime


class StopsOnSignal(Callback):
    """Installs the handler that `exit_signal_handler` is about.

    Megatron-Bridge 0.3.1 asks it after every step whether a rank got the signal, but installs it nowhere.

    Args:
        stop_file: where it is there after a step, rank 0 gets the signal. A signal that torchrun hands on is
            followed by SIGKILL, up to torch 2.10 always after 30 seconds, which may be less than a step and a
            checkpoint take.
    """

    def __init__(self, stop_file: str | None = None) -> None:
        self.handler: Any = None
        self.stop_file = Path(stop_file) if stop_file else None

    def on_train_start(self, context: CallbackContext) -> None:
        self.handler = context.state.signal_handler.__enter__()

    def on_train_step_end(self, context: CallbackContext) -> None:
        if self.stop_file and runtime.rank() == 0 and self.stop_file.exists():
            signal.raise_signal(signal.SIGTERM)

    def release(self) -> None:
        """Gives the signal back to whoever handled it before."""
        if self.handler is not None:
            self.handler.release()
