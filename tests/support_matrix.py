"""The support matrix of the README, asked of the wrappers themselves: python tests/support_matrix.py

Every family's tiny config is built on the meta device; its slice table says which hparams it has, and the
check at the door whether each can be cut.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import models
from nemotron_h import write_nemotron_h

from mbridge_prune import UserError
from mbridge_prune.dry_run import check_target, meta_table
from mbridge_prune.prune_config import HPARAMS

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- support matrix: python tests/support_matrix.py -->", "<!-- end of the support matrix -->"
ROWS = {  # family as its users know it: tiny config
    "Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Mistral": "mistral", "Nemotron": "nemotron",
    "Gemma": "gemma", "Gemma 2": "gemma2", "Gemma 3": "gemma3", "Qwen3-MoE": "qwen3_moe_mixed",
    "OLMoE": "olmoe", "gpt-oss": "gpt_oss", "DeepSeek-V2": "deepseek_v2", "DeepSeek-V3, Kimi": "deepseek_v3",
    "Moonlight": "moonlight",
    "GLM-4.5": "glm4_moe", "Qwen3-Next": "qwen3_next", "Nemotron-H, Nano v2": "nemotron_h", "Nemotron 3 Nano": "nemotron_h_moe",
    "Gemma 3 VL": "gemma3_vl", "Qwen2.5-VL": "qwen2_5_vl", "Qwen3-VL": "qwen3_vl",
    "Qwen3-VL-MoE": "qwen3_vl_moe", "GLM-4.5V": "glm4v_moe",
}  # fmt: skip

PATTERNS = {"nemotron_h": "M-M*-", "nemotron_h_moe": "MEM*ME"}


def write_model(name: str, path: Path) -> None:
    if name in PATTERNS:
        write_nemotron_h(path, PATTERNS[name])
    else:
        models.write_hf(name, path)


def ask(name: str, path: Path) -> dict[str, str]:
    """hparam -> "" where it can be cut, the reason where it cannot; others the family does not have."""
    write_model(name, path)
    provider = check_target(path, {}, trust_remote_code=True)
    full = meta_table(provider).hparams()
    return {hparam: refusal(path, hparam, full[hparam]) for hparam in HPARAMS if hparam in full}


def refusal(path: Path, hparam: str, full: int) -> str:
    """Why no smaller size of this hparam alone passes the door; empty if one does."""
    half = ""
    for size in range(full - 1, 0, -1):
        try:
            check_target(path, {hparam: size}, trust_remote_code=True)
            return ""
        except UserError as error:
            half = str(error) if size == full // 2 else half
    return half


def in_general(reason: str) -> str:
    """A refusal without the names and numbers of the tiny model that it was said of."""
    reason = re.sub(r"\w+(Model|ForCausalLM|ForConditionalGeneration)", "the model", reason)
    return re.sub(r"\b\d[\d,]*\b", "N", reason)


def matrix(root: Path) -> str:
    """Markdown: a row a family, a column an hparam; below, what is said of one that cannot go alone."""
    asked = {title: ask(name, root / name) for title, name in ROWS.items()}
    columns = [f"`{hparam}`" for hparam in HPARAMS]
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " :---: |" * len(columns)]
    notes: list[str] = []
    for title, answers in asked.items():
        marks = []
        for hparam in HPARAMS:
            reason = in_general(answers.get(hparam, ""))
            if reason and reason not in notes:
                notes.append(reason)
            marks.append(
                "" if hparam not in answers else f"no ({notes.index(reason) + 1})" if reason else "yes"
            )
        lines.append(f"| {title} | " + " | ".join(marks) + " |")
    return "\n".join([*lines, "", *(f"{n}. `{note}`" for n, note in enumerate(notes, start=1))])


def section() -> str:
    with tempfile.TemporaryDirectory() as root:
        return f"{BEGIN}\n\n{matrix(Path(root))}\n\n{END}"


def main() -> int:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + section() + after)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.exit(main())
