"""What other packages say is kept out of the log where it is wrong or disturbs, and only there."""

from __future__ import annotations

import json
import logging

import pytest
from models import load
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from mbridge_prune.bridge.load import load_tokenizer
from mbridge_prune.bridge.quiet import quiet


@pytest.mark.parametrize("kind, speaks", [("llama", False), ("mistral", True)])
def test_a_warning_about_mistrals_tokenizer_is_for_mistrals(hf_folder, tmp_path, kind, speaks):
    backend = Tokenizer(WordLevel({f"w{n}": n for n in range(100_001)}, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)  # as many as Qwen has
    config = json.loads((hf_folder("llama") / "config.json").read_text())
    config |= {"model_type": kind, "transformers_version": "4.57.3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    speaker = logging.getLogger("transformers.tokenization_utils_base")
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    speaker.addHandler(handler)
    level, speaker.level = speaker.level, logging.WARNING
    try:
        assert load_tokenizer(tmp_path) is not None
    finally:
        speaker.removeHandler(handler)
        speaker.level = level
    assert any("fix_mistral_regex" in said for said in heard) == speaks


def test_counts_of_ranks_are_not_printed(hf_folder, capfd):
    from megatron.bridge.models import model_provider

    printing = model_provider._print_num_params
    load(hf_folder("llama"))
    assert "number of parameters" not in "".join(capfd.readouterr())
    assert model_provider._print_num_params is printing


def test_megatron_speaks_again_also_after_an_error(monkeypatch):
    logger = logging.getLogger("megatron.core")
    monkeypatch.setattr(logger, "level", logging.INFO)  # whatever another test has left
    with pytest.raises(OSError, match="lost"), quiet():
        assert logger.level == logging.ERROR
        raise OSError("lost")
    assert logger.level == logging.INFO
