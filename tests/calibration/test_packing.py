"""Packed sequences are full, deterministic and made of whole documents in a shuffled order."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mbridge_prune.calibration.packing import (
    calibration_tokens,
    end_of_text_id,
    load_tokens,
    pack,
    sources_of,
    token_fingerprint,
)
from mbridge_prune.errors import UserError

EOT, EOS, BOS = 0, 1, 2


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One id a word: ``w0`` is 3, ``w1`` is 4, and so on."""
    words = ["<|endoftext|>", "</s>", "<s>", *(f"w{i}" for i in range(3000))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


TOKENIZER = make_tokenizer(eos_token="</s>", bos_token="<s>", unk_token="<|endoftext|>")
DOCUMENTS = [f"w{3 * i} w{3 * i + 1} w{3 * i + 2}" for i in range(40)]


@given(samples=st.integers(1, 8), length=st.integers(1, 20), seed=st.integers(0, 99))
def test_pack_is_the_joined_shuffled_documents(samples, length, seed):
    tokens = pack(DOCUMENTS, TOKENIZER, num_samples=samples, seq_length=length, seed=seed)
    assert tokens.shape == (samples, length)
    assert tokens.dtype == torch.int64
    flat = tokens.flatten().tolist()
    firsts = []
    for at, token in enumerate(flat):
        if at % 4 == 3:
            assert token == EOT
        else:
            assert (token - 3) % 3 == at % 4
            if at % 4 == 0:
                firsts.append(token)
            else:
                assert token == flat[at - 1] + 1
    assert len(set(firsts)) == len(firsts)


def test_same_seed_same_tokens_other_seed_other_order():
    def packed(seed):
        return pack(DOCUMENTS, TOKENIZER, num_samples=4, seq_length=16, seed=seed)

    assert torch.equal(packed(1), packed(1))
    assert not torch.equal(packed(1), packed(2))


def test_order_does_not_depend_on_how_much_is_asked_for():
    short = pack(DOCUMENTS, TOKENIZER, num_samples=2, seq_length=10)
    long = pack(DOCUMENTS, TOKENIZER, num_samples=9, seq_length=10)
    assert torch.equal(short, long[:2])


def test_endless_stream_is_read_only_as_far_as_needed():
    read = 0

    def stream():
        nonlocal read
        while True:
            read += 1
            yield "w1 w2 w3"

    tokens = pack(stream(), TOKENIZER, num_samples=3, seq_length=8)
    assert tokens.shape == (3, 8)
    assert read < 1200


def test_bos_heads_every_sequence():
    plain = pack(DOCUMENTS, TOKENIZER, num_samples=3, seq_length=7)
    tokens = pack(DOCUMENTS, TOKENIZER, num_samples=3, seq_length=8, add_bos=True)
    assert (tokens[:, 0] == BOS).all()
    assert torch.equal(tokens[:, 1:], plain)
    with pytest.raises(UserError, match="no BOS"):
        pack(
            DOCUMENTS,
            make_tokenizer(eos_token="</s>"),
            num_samples=1,
            seq_length=8,
            add_bos=True,
        )
    with pytest.raises(UserError, match="leaves no room"):
        pack(DOCUMENTS, TOKENIZER, num_samples=1, seq_length=1, add_bos=True)


def test_too_little_text_says_how_much_there_is():
    with pytest.raises(UserError, match=r"gives 16 sequences of 10 tokens \(160 tokens\), 17 were"):
        pack(DOCUMENTS, TOKENIZER, num_samples=17, seq_length=10)
    with pytest.raises(UserError, match="num_samples=0"):
        pack(DOCUMENTS, TOKENIZER, num_samples=0, seq_length=10)


def test_end_of_text_id():
    assert end_of_text_id(TOKENIZER) == EOT
    assert end_of_text_id(make_tokenizer(eos_token="</s>")) == EOS
    with pytest.raises(UserError, match="give eod_id"):
        end_of_text_id(make_tokenizer())
    tokens = pack(DOCUMENTS, TOKENIZER, num_samples=1, seq_length=8, eod_id=77)
    assert tokens[0, 3] == tokens[0, 7] == 77


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_token_files_round_trip(tmp_path, dtype):
    ids = np.arange(24).reshape(4, 6).astype(dtype)
    np.save(tmp_path / "two.npy", ids)
    np.save(tmp_path / "one.npy", np.append(ids.flatten(), dtype(1)))
    save_file({"ids": torch.from_numpy(ids.astype(np.int32))}, tmp_path / "t.safetensors")
    expected = torch.arange(18).view(3, 6)
    for name in ("two.npy", "one.npy", "t.safetensors"):
        tokens = calibration_tokens(tmp_path / name, None, 3, 6, vocab_size=24)
        assert tokens.dtype == torch.int64
        assert torch.equal(tokens, expected)


def test_bad_token_files(tmp_path):
    path = tmp_path / "t.npy"
    np.save(path, np.arange(24).reshape(4, 6))
    with pytest.raises(UserError, match=r"ids from 0 to 23, expected from 0 to 22 \(vocab_size\)"):
        load_tokens(path, vocab_size=23)
    with pytest.raises(UserError, match="set seq_length=6"):
        load_tokens(path, seq_length=5)
    with pytest.raises(UserError, match="gives 4 sequences of 6 tokens, 5 were asked"):
        load_tokens(path, num_samples=5)
    for array, message in [
        (np.ones((2, 2)), "holds float64"),
        (np.ones((2, 2, 2), int), r"shape \[2, 2, 2\]"),
        (np.ones(8, int), r"shape \[8\]"),
        (np.full((2, 2), -1), "ids from -1"),
        (np.ones((0, 4), int), "gives 0 sequences"),
    ]:
        np.save(path, array)
        with pytest.raises(UserError, match=message):
            load_tokens(path)
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match="as a NumPy array"):
        load_tokens(path)
    with pytest.raises(UserError, match="no such file"):
        load_tokens(tmp_path / "absent.npy")
    two = {"a": torch.zeros(2, 2, dtype=torch.int), "b": torch.zeros(1, dtype=torch.int)}
    save_file(two, tmp_path / "t.safetensors")
    with pytest.raises(UserError, match="holds 2 tensors"):
        load_tokens(tmp_path / "t.safetensors")
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "t.safetensors")
    with pytest.raises(UserError, match="expected integer"):
        load_tokens(tmp_path / "t.safetensors")
    (tmp_path / "t.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="as safetensors"):
        load_tokens(tmp_path / "t.safetensors")


def test_fingerprint_sees_ids_and_shape_but_not_dtype():
    tokens = torch.arange(12).view(3, 4)
    assert token_fingerprint(tokens) == token_fingerprint(tokens.int())
    others = [tokens.view(4, 3), tokens.flip(0), tokens + 1]
    assert len({token_fingerprint(t) for t in [tokens, *others]}) == 4
    assert len(token_fingerprint(tokens)) == 16


def test_calibration_tokens_from_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    tokens = calibration_tokens(path, TOKENIZER, 4, 16, seed=5, vocab_size=3003)
    assert torch.equal(tokens, pack(DOCUMENTS, TOKENIZER, num_samples=4, seq_length=16, seed=5))
    with pytest.raises(UserError, match="another tokenizer than the model's"):
        calibration_tokens(path, TOKENIZER, 4, 16, vocab_size=20)


def test_a_mixture_has_its_shares_everywhere_and_begins_alike(tmp_path):
    tokenizer, paths = TOKENIZER, []
    for number in range(2):
        words = [f"w{1000 * number + i}" for i in range(900)]
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text(" ".join(words))
    source = f"0.7,{paths[0]},0.3,{paths[1]}"
    tokens_ns = calibration_tokens(source, tokenizer, 40, 8)
    of_second = (tokens_ns >= 1003).all(1)
    assert ((tokens_ns < 1003).all(1) ^ of_second).all(), "a sample is of one source"
    assert [int(block.sum()) for block in of_second.split(10)] == [3, 3, 3, 3]
    assert len({tuple(block.tolist()) for block in of_second.split(10)}) > 1, "no pattern that repeats"
    for number, path in enumerate(paths):
        alone = calibration_tokens(path, tokenizer, 40, 8)
        of_this = tokens_ns[of_second == bool(number)]
        assert torch.equal(of_this, alone[: len(of_this)])
    assert torch.equal(calibration_tokens(source, tokenizer, 23, 8), tokens_ns[:23])
    halves = calibration_tokens(f"{paths[0]}, {paths[1]}", tokenizer, 20, 8)
    assert int((halves >= 1003).all(1).sum()) == 10


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("0.5,{0},{1}", "neither source,source"),
        ("{0},-1,{1},2", "neither source,source"),
        ("-1,{0},2,{1}", "above 0"),
        ("nan,{0},2,{1}", "above 0"),
        ("inf,{0},2,{1}", "above 0"),
        ("{0},", "empty source"),
        ("{0},,{1}", "empty source"),
        ("0.99,{0},0.01,{1}", "leaves none of .*1.txt"),
        ("{0},{0}.gone", "gone"),
    ],
)
def test_mixtures_that_are_none(tmp_path, source, said):
    paths = [tmp_path / f"{number}.txt" for number in range(2)]
    for path in paths:
        path.write_text(" ".join(f"w{i}" for i in range(500)))
    with pytest.raises(UserError, match=said):
        calibration_tokens(source.format(*paths), TOKENIZER, 4, 8)


def test_a_path_with_a_comma_is_one_source(tmp_path):
    path = tmp_path / "a,b.txt"
    path.write_text(" ".join(f"w{i}" for i in range(500)))
    assert calibration_tokens(path, TOKENIZER, 4, 8).shape == (4, 8)


def test_many_names_are_no_path_that_is_too_long():
    names = [f"corpus-{number:03}.jsonl" for number in range(40)]
    assert sources_of(",".join(names)) == (names, None)
