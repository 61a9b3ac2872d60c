"""SIGTERM ends a training run behind a checkpoint."""

from __future__ import annotations

from typing import Any

from megatron.bridge.training.callbacks import Callback, CallbackContext


class StopsOnSignal(Callback):
    """Installs the handler that `exit_signal_handler` is about.

    Megatron-Bridge 0.3.1 asks it after every step whether a rank got the signal, but installs it nowhere.
    """

    def __init__(self) -> None:
        self.handler: Any = None

    def on_train_start(self, context: CallbackContext) -> None:
        self.handler = context.state.signal_handler.__enter__()

    def release(self) -> None:
        """Gives the signal back to whoever handled it before."""
        if self.handler is not None:
            self.handler.release()
