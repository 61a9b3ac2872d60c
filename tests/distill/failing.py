"""launch/distill.py, with the process killed at a chosen moment of its second checkpoint.

python tests/distill/failing.py shards|tracker|config|never arguments...
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from commands import launched

from mbridge_prune import cli
from mbridge_prune.bridge.training_loop import TRAINING, import_bridge

SECOND = "iter_0000006"


def die() -> None:
    """As a batch system does: with the helpers that Megatron's checkpoints start, which would outlive us."""
    sys.stdout.flush()
    os.killpg(0, signal.SIGKILL)


def arrange(moment: str) -> None:
    """Puts a death into Megatron-Bridge's saving code."""
    from megatron.bridge.training import checkpointing, config

    save, copy, to_yaml = (
        checkpointing.dist_checkpointing.save,
        checkpointing.shutil.copy,
        config.ConfigContainer.to_yaml,
    )

    def saving(state, place, *args, **kwargs):
        result = save(state, place, *args, **kwargs)
        if moment == "shards" and SECOND in str(place):
            shard = next(Path(place).glob("*.distcp"))
            shard.write_bytes(shard.read_bytes()[:200])
            die()
        return result

    def copying(source, target):
        if moment == "tracker" and SECOND in str(source):
            Path(target).write_bytes(Path(source).read_bytes()[:50])
            die()
        return copy(source, target)

    def writing(self, path, *args, **kwargs):
        if moment == "config" and SECOND in str(path):
            die()
        return to_yaml(self, path, *args, **kwargs)

    checkpointing.dist_checkpointing.save = saving
    checkpointing.shutil.copy = copying
    config.ConfigContainer.to_yaml = writing


if __name__ == "__main__":
    os.setsid()
    import_bridge(TRAINING)
    arrange(sys.argv[1])
    cli.leave(cli.run(launched("distill").main, sys.argv[2:]))
