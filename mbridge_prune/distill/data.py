"""Megatron indexed datasets and their blends, for the training loop."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.bridge.training.config import DatasetBuildContext, DatasetProvider
from torch.utils.data import Dataset

from mbridge_prune.blends import blend
from mbridge_prune.errors import UserError, nearest

SIDECAR = ".json"
"""Beside PREFIX.bin and PREFIX.idx: what launch/prepare_data.py made them with."""
FOR_EVER = 2**40


@dataclass(kw_only=True)
class IndexedData(DatasetProvider):
    """Blends of indexed datasets, documents packed one after another into full sequences.

    Args:
        train, valid: (prefixes, weights or None), as `blend` gives them; no validation without `valid`.
        valid_samples: of one validation.
        seq_length: tokens a sample; a sample's labels are the tokens after.
        seed: order of the samples.
        cache: folder of the samples' index, built once by rank 0.
    """

    train: tuple[list[str], list[float] | None]
    valid: tuple[list[str], list[float] | None] | None = None
    valid_samples: int = 0
    seq_length: int = 8192
    seed: int = 1234
    cache: str | None = None
    tokenizer: Any = field(default=None, repr=False)

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Dataset, Dataset | None, None]:
        """(train, the same validation samples again and again or None, None)"""
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        config = GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.seq_length,
            blend_per_split=[self.train, self.valid, None],
            path_to_cache=self.cache,
            tokenizer=_Numbers(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        valid = self.valid_samples if self.valid else None
        train_set, valid_set, _ = BlendedMegatronDatasetBuilder(
            GPTDataset, [context.train_samples, valid, None], lambda: True, config
        ).build()
        return train_set, None if valid_set is None else Repeated(valid_set, self.valid_samples), None


class _Numbers:
    """All that Megatron's dataset asks of a tokenizer where nothing is masked: tokens stay as they are."""

    eod = pad = -1
    vocab_size = None
    unique_identifiers = {"class": "mbridge_prune.tokens"}


class Repeated(Dataset):
    """The first `n` samples of a dataset, again and again, so that validations compare."""

    def __init__(self, samples: Dataset, n: int):
        self.samples, self.n = samples, n

    def __len__(self) -> int:
        return FOR_EVER // self.n * self.n

    def __getitem__(self, place: int) -> Any:
        return self.samples[place % self.n]


def weighed(words: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """As `blend`, and where several prefixes have no weights, each weighs as many tokens as it holds.

    Without weights, megatron-core gives a blend each dataset's samples once, and no run more than one epoch.
    """
    prefixes, weights = blend(words)
    if weights is None and len(prefixes) > 1:
        weights = [float(tokens_in(prefix)) for prefix in prefixes]
    return prefixes, weights


def tokens_in(prefix: str) -> int:
    """Tokens of an indexed dataset."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(prefix)  # its arrays are views of a file that it unmaps when it goes
    return int(data.sequence_lengths.sum())


def check_prefixes(prefixes: Sequence[str], vocab_size: int, vocabulary: str | None) -> int:
    """Refuses datasets that are not there or were not made for this vocabulary; returns their tokens.

    Args:
        vocab_size: of the models.
        vocabulary: fingerprint of the models' tokenizer, compared with the one beside a dataset.

    Raises:
        UserError: naming the dataset.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    tokens = 0
    for prefix in prefixes:
        for suffix in (".bin", ".idx"):
            if not Path(prefix + suffix).is_file():
                known = [str(f.with_suffix("")) for f in Path(prefix).parent.glob("*.idx")]
                raise UserError(
                    f"no indexed dataset {prefix}: {prefix}{suffix} is missing{nearest(prefix, known)}; "
                    "make one with launch/prepare_data.py"
                )
        made = _sidecar(prefix)
        if vocabulary and made.get("vocabulary", vocabulary) != vocabulary:
            raise UserError(
                f"{prefix} was made with another tokenizer ({made.get('tokenizer')}): prepare it "
                "anew with the student's"
            )
        try:
            data = IndexedDataset(prefix)
            lengths = data.sequence_lengths
            greatest = max(
                (int(data[i].max()) for i in range(min(len(lengths), 64)) if lengths[i]), default=-1
            )
        except (OSError, ValueError, AssertionError, IndexError) as error:
            raise UserError(f"{prefix} is no readable indexed dataset: {error}") from error
        if greatest < 0:
            raise UserError(f"{prefix} holds no tokens")
        if greatest >= vocab_size:
            raise UserError(
                f"{prefix} has token {greatest}, the models know 0 to {vocab_size - 1}: another tokenizer?"
            )
        tokens += int(lengths.sum())
    return tokens


def _sidecar(prefix: str) -> dict[str, Any]:
    path = Path(prefix + SIDECAR)
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
