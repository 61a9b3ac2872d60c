"""The prompt to the letter, the sample, the tokens, and every form that the data comes in."""

from __future__ import annotations

import csv
import json

import pytest
import questions
from questions import SUBJECTS, TESTS, rows

from mbridge_prune.errors import UserError
from mbridge_prune.evaluate.mmlu_data import SUBJECTS as ALL
from mbridge_prune.evaluate.mmlu_data import read_mmlu
from mbridge_prune.evaluate.mmlu_prompts import letter_ids, pick, prompts

ONE = ("abstract_algebra",)
EXPECTED = """\
The following are multiple choice questions (with answers) about abstract algebra.

Find 1 + 1 in Z_2.
A. 0
B. 1
C. 2
D. 3
Answer: A

Find 1 + 1 in Z_3.
A. 0
B. 1
C. 2
D. 3
Answer:"""


@pytest.fixture
def pair(tmp_path):
    """One example and one question."""
    for split, text, answer in (("dev", "Find 1 + 1 in Z_2.", 0), ("test", "Find 1 + 1 in Z_3.", 2)):
        row = {"question": text, "choices": ["0", "1", "2", "3"], "answer": answer, "subject": ONE[0]}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n\n")
    return tmp_path


def test_the_standard_prompt(pair, tokenizer):
    asked = prompts(tokenizer, 1.0, few_shot=1, data=pair, subjects=ONE)
    assert [tokenizer.decode(p.ids) for p in asked.prompts] == [EXPECTED]
    assert (asked.prompts[0].answer, asked.prompts[0].subject) == (2, ONE[0])
    header, _, question = EXPECTED.split("\n\n")
    (zero,) = prompts(tokenizer, 1.0, data=pair, subjects=ONE).prompts
    assert tokenizer.decode(zero.ids) == f"{header}\n\n{question}"
    assert tokenizer.convert_ids_to_tokens(asked.letters) == ["ĠA", "ĠB", "ĠC", "ĠD"]


def test_what_the_tokenizer_puts_in_front_stays(pair):
    with_bos = questions.tokenizer(bos=True)
    plain, begun = (prompts(t, 1.0, data=pair, subjects=ONE) for t in (questions.tokenizer(), with_bos))
    assert begun.prompts[0].ids == [with_bos.bos_token_id, *plain.prompts[0].ids]
    assert begun.letters == plain.letters


def test_a_letter_of_two_tokens_is_refused():
    with pytest.raises(UserError, match=r"no single token for ' A' behind 'Answer:' .*'Ġ', 'A'.* kl or loss"):
        letter_ids(questions.tokenizer(letters=False))


def test_a_share_of_every_subject(site, tokenizer):
    asked = lambda percentage, seed=0, subjects=SUBJECTS: prompts(
        tokenizer, percentage, data=site / "mmlu", seed=seed, subjects=subjects
    )
    half = asked(0.5)
    assert [p.subject for p in half.prompts] == [s for s in SUBJECTS for _ in range(TESTS // 2)]
    assert half == asked(0.5)
    assert half.fingerprint != asked(0.5, seed=1).fingerprint
    everything = [p.ids for p in asked(1.0).prompts]
    assert [p.ids for p in half.prompts[:6]] != everything[:6]  # a sample, no prefix
    places = [everything.index(p.ids) for p in half.prompts]
    assert places == sorted(places)
    assert asked(0.5, subjects=SUBJECTS[1:]).prompts == half.prompts[6:]
    assert len(asked(0.001).prompts) == len(SUBJECTS)


def test_every_question_is_as_likely_as_another():
    drawn = [q for seed in range(400) for q in pick(range(20), 0.25, f"{seed}")]
    counts = [drawn.count(q) for q in range(20)]
    assert len(drawn) == 2000 and min(counts) > 65 and max(counts) < 135


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"percentage": 0}, "percentage=0, expected a share above 0"),
        ({"percentage": 10}, "percentage=10, .*0.1 is 10 %"),
        ({"few_shot": -1}, "few_shot=-1"),
        ({"few_shot": 6}, "few_shot=6, but abstract_algebra has 5 dev examples"),
        ({"subjects": ("anatomie",)}, "no MMLU subject 'anatomie' .*'anatomy'"),
        ({"subjects": ALL}, "has no test questions of astronomy, business_ethics, .* and 51 more"),
        ({"data": "/nowhere"}, "no such folder of MMLU data: /nowhere"),
    ],
)
def test_wrong_requests(site, tokenizer, change, message):
    right = {"percentage": 0.5, "few_shot": 1, "data": site / "mmlu", "subjects": SUBJECTS}
    with pytest.raises(UserError, match=message):
        prompts(tokenizer, **{**right, **change})
    with pytest.raises(UserError, match="no tokenizer"):
        prompts(None, **right)


def test_the_papers_subjects():
    assert len(ALL) == len(set(ALL)) == 57
    assert list(ALL) == sorted(ALL)


def without(row, *keys):
    return {key: value for key, value in row.items() if key not in keys}


def write_arrow(path, table_rows, stream):
    import pyarrow as pa

    table = pa.Table.from_pylist(table_rows)
    opened = (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema)
    with opened as writer:
        writer.write_table(table)


def write_parquet(path, table_rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(table_rows), path)


def hub_copy(folder, split, subject, own):
    (folder / subject).mkdir(parents=True, exist_ok=True)
    (folder / "all").mkdir(exist_ok=True)
    write_parquet(folder / subject / f"{split}-00000-of-00001.parquet", own)
    write_parquet(folder / "all" / f"{split}-00000-of-00001.parquet", own)  # repeats the others


def saved_by_datasets(folder, split, subject, own):
    (folder / subject / split).mkdir(parents=True)
    write_arrow(folder / subject / split / "data-00000-of-00001.arrow", own, stream=True)


def arrow_files(folder, split, subject, own):
    (folder / subject).mkdir(exist_ok=True)
    write_arrow(folder / subject / f"{split}.arrow", [without(row, "subject") for row in own], stream=False)


def papers_csv(folder, split, subject, own):
    (folder / split).mkdir(exist_ok=True)
    with open(folder / split / f"{subject}_{split}.csv", "w", newline="") as file:
        csv.writer(file).writerows([r["question"], *r["choices"], "ABCD"[r["answer"]]] for r in own)


def jsonl_in_one(folder, split, subject, own):
    with open(folder / f"{split}.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in own)


@pytest.mark.parametrize("form", [hub_copy, saved_by_datasets, arrow_files, papers_csv, jsonl_in_one])
def test_every_form_reads_the_same(form, site, tmp_path):
    for subject in SUBJECTS:
        for split, n in (("test", TESTS), ("dev", 5), ("validation", 3)):
            form(tmp_path, split, subject, rows(subject, split, n))
    for split in ("test", "dev"):
        assert read_mmlu(tmp_path, split, SUBJECTS) == read_mmlu(site / "mmlu", split, SUBJECTS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a", "choices": ["1"], "answer": 0}', "row 2: 1 choices, expected 4"),
        ('{"question": "a", "choices": [1, 2, 3, 4], "answer": 4}', "row 2: answer=4, expected 0 to 3"),
        ('{"q": 1}', "row 2: expected the keys question, choices and answer, found: q"),
        ('{"question": ', "test.jsonl after row 1: "),
    ],
)
def test_broken_records_are_named(line, message, tmp_path):
    (tmp_path / "anatomy").mkdir()
    good = json.dumps(without(rows("anatomy", "test", 1)[0], "subject"))
    (tmp_path / "anatomy" / "test.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=message):
        read_mmlu(tmp_path, "test", ("anatomy",))


def test_folders_without_questions(tmp_path):
    with pytest.raises(UserError, match="holds no test questions: no .arrow, .parquet, .jsonl, .csv file"):
        read_mmlu(tmp_path, "test", ONE)
    (tmp_path / "test.jsonl").write_text(json.dumps(without(rows("anatomy", "test", 1)[0], "subject")))
    with pytest.raises(UserError, match="row 1: no subject, neither a key nor the name"):
        read_mmlu(tmp_path, "test", ONE)


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    import datasets

    def fail(*arguments, **named):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="cannot read cais/mmlu from the hub: no route; give a local copy"):
        read_mmlu(None, "test")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: rows("anatomy", split, 2))
    assert len(read_mmlu(None, "test", ("anatomy",))["anatomy"]) == 2
