"""Settings of a run: typed dataclasses, filled recipe < YAML < command line, checked at the door.

Each field is, by its declaration alone, a YAML key (`calibration.num_samples`), a dot override
(`calibration.num_samples=64`) and a flag (`--calib-num-samples`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import yaml

from mbridge_prune.errors import UserError, nearest
from mbridge_prune.prune_config import DEPTHS, DIVISORS, EXPERTS, RANKINGS, REPAIRS

BUDGETS = ("params", "active_params", "memory_mb", "flops")
RECIPES = Path(__file__).resolve().parent.parent / "configs"


def option(
    default: Any, help: str, *flags: str, choices: Sequence[str] = (), least: float | None = None
) -> Any:
    """A field with its help text, its flags and, where it has them, its choices and its least value.

    Integers are 1 or more unless `least` says otherwise.
    """
    meta = {"help": help, "flags": flags, "choices": tuple(choices), "least": least}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(kw_only=True)
class Model:
    """The model to prune."""

    hf_path: str | None = option(
        None, "Hugging Face folder or hub name", "--hf-path", "--hf-model-name-or-path",
        "--hf_model_name_or_path",
    )  # fmt: skip
    megatron_path: str | None = option(
        None, "start from this Megatron checkpoint; --hf-path is its config (default: the one beside)",
        "--megatron-path", "--megatron_path",
    )  # fmt: skip
    trust_remote_code: bool = option(
        False, "let transformers run the model's own code", "--trust-remote-code", "--trust_remote_code"
    )
    dtype: str = option(
        "auto", "auto is bfloat16 on GPUs, float32 on the CPU", "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip


@dataclass(kw_only=True)
class Parallel:
    """How the model is spread over ranks; what is left of the world is data parallel."""

    pp: int = option(1, "pipeline stages", "--pp", "--pp-size", "--pp_size", "--pipeline-model-parallel-size")
    tp: int = option(
        1, "tensor parallel ranks (more than 1 with --score-only alone)",
        "--tp", "--tp-size", "--tp_size", "--tensor-model-parallel-size",
    )  # fmt: skip
    ep: int = option(
        1, "expert parallel ranks, taken out of the data parallel ones",
        "--ep", "--ep-size", "--ep_size", "--expert-model-parallel-size",
    )  # fmt: skip
    num_layers_in_first_pipeline_stage: int | None = option(
        None, "layers of the first stage, where the split is uneven",
        "--num-layers-in-first-pipeline-stage", "--num_layers_in_first_pipeline_stage",
    )  # fmt: skip
    num_layers_in_last_pipeline_stage: int | None = option(
        None, "layers of the last stage, where the split is uneven",
        "--num-layers-in-last-pipeline-stage", "--num_layers_in_last_pipeline_stage",
    )  # fmt: skip


@dataclass(kw_only=True)
class Calibration:
    """The text that importance is measured on."""

    data: str | None = option(
        None, ".txt/.jsonl/.parquet file, a folder of them, token file (.npy/.safetensors) or dataset name; "
        "several as A,B or 0.7,A,0.3,B",
        "--calib-data", "--calib-dataset-name", "--calib_dataset_name",
    )  # fmt: skip
    num_samples: int = option(1024, "full sequences", "--calib-num-samples", "--calib_num_samples")
    seq_length: int = option(4096, "tokens a sequence", "--seq-length", "--seq_length")
    batch_size: int = option(1, "sequences a microbatch", "--calib-batch-size", "--calib_batch_size",
                             "--calib-mbs")  # fmt: skip
    split: str = option("train", "split of a dataset or folder", "--calib-split")
    text_key: str = option("text", "key of the text in a record", "--calib-text-key")
    chat_template: bool = option(False, "render messages with the chat template", "--calib-chat-template")
    add_bos: bool = option(False, "begin every sequence with the BOS token", "--calib-add-bos")
    seed: int = option(1234, "order of the documents", "--seed", least=0)


@dataclass(kw_only=True)
class Prune:
    """What to cut, and how."""

    export_config: dict[str, Any] = option(
        {}, "JSON: size of every hparam to prune", "--prune-export-config", "--prune_export_config"
    )
    importance: str = option("weighted", "ranking of the units", "--importance", choices=RANKINGS)
    depth: str = option("cosine", "ranking of the layers", "--depth", choices=DEPTHS)
    experts: str = option("gated", "ranking of routed experts: with or without the router's probability",
                          "--experts", choices=EXPERTS)  # fmt: skip
    repair: str = option("auto", "weight update with the cut (auto: least_squares where there is text)",
                         "--repair", choices=REPAIRS)  # fmt: skip
    repair_memory_gb: float = option(
        8.0, "memory of the sums that a repair is fitted on", "--repair-memory-gb"
    )
    repair_offload: bool = option(False, "keep these sums in host memory (slower)", "--repair-offload")
    scores: str | None = option(
        None, "scores file; read if it exists (default: scores.safetensors in the run folder)",
        "--scores", "--prune-intermediate-ckpt", "--prune_intermediate_ckpt",
    )  # fmt: skip
    score_only: bool = option(False, "write the scores and stop: nothing is cut", "--score-only",
                              "--score_only")  # fmt: skip
    skip_sorting: bool = option(False, "the weights are already sorted", "--skip-sorting", "--skip_sorting")
    hidden_size_divisor: int | None = option(
        None,
        "sizes must be multiples of it (a search: 256)",
        "--hidden-size-divisor",
        "--hidden_size_divisor",
    )
    ffn_hidden_size_divisor: int | None = option(
        None, "likewise, of experts too (512)", "--ffn-hidden-size-divisor", "--ffn_hidden_size_divisor"
    )
    mamba_head_dim_divisor: int | None = option(
        None, "likewise (8)", "--mamba-head-dim-divisor", "--mamba_head_dim_divisor"
    )
    num_moe_experts_divisor: int | None = option(
        None, "likewise (8)", "--num-moe-experts-divisor", "--num_moe_experts_divisor"
    )
    num_layers_divisor: int | None = option(
        None, "likewise (2)", "--num-layers-divisor", "--num_layers_divisor"
    )

    def divisors(self, usual: bool = False) -> dict[str, int]:
        """The steps that were given; where none was, 1, or the usual one of a search."""
        given = {name: getattr(self, f"{name}_divisor") for name in DIVISORS}
        return {f"{name}_divisor": step or (DIVISORS[name] if usual else 1) for name, step in given.items()}


@dataclass(kw_only=True)
class Search:
    """Auto pruning: the best architecture within a budget (in place of an export config)."""

    params: str | None = option(
        None, "at most so many parameters: 6e9, or 70%%", "--prune-target-params", "--prune_target_params"
    )
    active_params: str | None = option(
        None, "at most so many on a token", "--prune-target-active-params", "--prune_target_active_params"
    )
    memory_mb: str | None = option(
        None, "at most so many MiB of weights, caches and states", "--prune-target-memory-mb",
        "--prune_target_memory_mb",
    )  # fmt: skip
    flops: str | None = option(
        None, "at most so many operations a token", "--prune-target-flops", "--prune_target_flops"
    )
    score_func: str = option(
        "kl", "kl | loss | mmlu_10pct_bs1 | mmlu_10pct_5shot_bs1 | module:function, to be maximised",
        "--prune-score-func", "--prune_score_func",
    )  # fmt: skip
    score_lower_bound: float | None = option(
        None, "cut nothing if the best score is below it", "--score-lower-bound", "--score_lower_bound"
    )
    top_k: int = option(10, "candidates that get the score", "--top-k", "--top_k")
    max_width_pruning: float = option(
        0.4, "largest share of a width that may go", "--max-width-pruning", "--max_width_pruning"
    )
    max_depth_pruning: float = option(
        0.2, "largest share of the layers that may go", "--max-depth-pruning", "--max_depth_pruning"
    )
    hparams_to_skip: list[str] = option(
        [], "hparams that keep their size, with commas between", "--hparams-to-skip", "--hparams_to_skip"
    )
    space: dict[str, Any] = option(
        {}, 'JSON: {"hidden_size": {"min": 2048, "max": 3584}} in place of the shares', "--search-space"
    )
    candidate_filter: str | None = option(
        None, "module:function(sizes) -> bool, False for unwanted ones", "--candidate-filter"
    )
    num_samples: int = option(16, "sequences of text kept aside to measure on", "--search-num-samples")
    mmlu_data: str | None = option(None, "local MMLU folder (default: the hub's)", "--mmlu-data")
    batch_size: int = option(1, "sequences at a time that memory is for", "--serving-batch-size")
    seq_length: int = option(4096, "tokens of each that memory and flops are for", "--serving-seq-length")
    kv_dtype: str = option(
        "bfloat16", "of the cache that memory is for", "--serving-kv-dtype",
        choices=("bfloat16", "float16", "float32"),
    )  # fmt: skip
    export_top_k: int = option(0, "also export the best so many, side by side", "--export-top-k", least=0)

    def budgets(self) -> dict[str, str]:
        """The bounds that were given."""
        return {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}

    def changed(self) -> list[str]:
        """The flags of the settings that are not as they are by default."""
        usual = type(self)()
        return [
            f.metadata["flags"][0] for f in fields(self) if getattr(self, f.name) != getattr(usual, f.name)
        ]


@dataclass(kw_only=True)
class Output:
    """What the run leaves."""

    path: str | None = option(
        None, "run folder: hf/, scores, plan.json, run.log (default: <output model>.run)", "--output", "-o"
    )
    hf_path: str | None = option(
        None, "the pruned Hugging Face model (default: hf/ in the run folder)",
        "--output-hf-path", "--output_hf_path",
    )  # fmt: skip
    megatron_path: str | None = option(
        None,
        "also a Megatron torch_dist checkpoint, here",
        "--output-megatron-path",
        "--output_megatron_path",
    )
    tensorboard_dir: str | None = option(None, "also TensorBoard's event files, here", "--tensorboard-dir")
    wandb_project: str | None = option(None, "also a run of this Weights & Biases project", "--wandb-project")


class Command:
    """The settings of a command: a dataclass of sections, itself of dataclasses of options.

    Attributes:
        PROGRAM, DESCRIPTION: for `--help`.
        EXAMPLE: a setting as `section.name=value`.
        RECIPES: the folder of its recipes.
    """

    PROGRAM: ClassVar[str]
    DESCRIPTION: ClassVar[str]
    EXAMPLE: ClassVar[str]
    RECIPES: ClassVar[Path] = RECIPES


@dataclass(kw_only=True)
class Settings(Command):
    """All settings of `launch/prune.py`."""

    PROGRAM: ClassVar[str] = "prune.py"
    DESCRIPTION: ClassVar[str] = (
        "Prunes a Hugging Face language model through Megatron and writes a smaller one."
    )
    EXAMPLE: ClassVar[str] = "prune.export_config.ffn_hidden_size=1152"

    model: Model = field(default_factory=Model)
    parallel: Parallel = field(default_factory=Parallel)
    calibration: Calibration = field(default_factory=Calibration)
    prune: Prune = field(default_factory=Prune)
    search: Search = field(default_factory=Search)
    output: Output = field(default_factory=Output)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def run_folder(self) -> Path:
        if self.output.path:
            return Path(self.output.path)
        for given in (self.output.hf_path, self.output.megatron_path):
            if given:
                return Path(f"{given.rstrip('/')}.run")
        raise UserError("no output folder: give --output, --output-hf-path or --output-megatron-path")

    def hf_folder(self) -> Path:
        return Path(self.output.hf_path) if self.output.hf_path else self.run_folder() / "hf"

    def result(self) -> Path:
        """What is there when a run is finished."""
        return self.hf_folder()

    def scores_file(self) -> Path:
        return Path(self.prune.scores) if self.prune.scores else self.run_folder() / "scores.safetensors"


Kind = TypeVar("Kind", bound=Command)


def set_key(settings: Any, key: str, value: Any, where: str) -> None:
    """Sets `section.name`, or `prune.export_config.hparam`, to a checked value.

    Raises:
        UserError: an unknown key (with the nearest right one) or a value of the wrong kind.
    """
    sections = {f.name: getattr(settings, f.name) for f in fields(settings)}
    section, _, name = key.partition(".")
    if section not in sections:
        known = [*sections, *(f"{s}.{f.name}" for s, part in sections.items() for f in fields(part))]
        raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)}; sections: {', '.join(sections)}")
    part = sections[section]
    name, _, inner = name.partition(".")
    options = {f.name: f for f in fields(part)}
    if name not in options:
        raise UserError(
            f"{where}: unknown key {key!r}{nearest(name, options)}; keys of {section}: {', '.join(options)}"
        )
    if inner:
        if options[name].type != "dict[str, Any]":
            raise UserError(f"{where}: {section}.{name} holds no further keys, got {key!r}")
        mapping, (*path, last) = getattr(part, name), inner.split(".")
        for step in path:
            mapping = mapping.setdefault(step, {})
        mapping[last] = _sizes(f"{where}: {section}.{name}.{inner}", value)
        return
    setattr(part, name, _checked(f"{where}: {section}.{name}", value, options[name]))


def _checked(where: str, value: Any, option_field: dataclasses.Field) -> Any:
    kind = str(option_field.type)
    if value is None:
        if "None" in kind:
            return None
        raise UserError(f"{where} needs a value")
    choices = option_field.metadata["choices"]
    if choices and value not in choices:
        raise UserError(
            f"{where}={value!r} is not a choice{nearest(value, choices)}; choices: {', '.join(choices)}"
        )
    if kind.startswith("bool"):
        if not isinstance(value, bool):
            raise UserError(f"{where}={value!r} is not true or false")
    elif kind.startswith("int"):
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{where}={value!r} is not an integer")
        least = option_field.metadata["least"]
        if value < (1 if least is None else least):
            raise UserError(f"{where}={value} must be at least {1 if least is None else least}")
    elif kind.startswith("float"):
        return _number(where, value, option_field.metadata["least"])
    elif kind.startswith("list"):
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{where}={value!r} is not a list of names")
        return [name.strip() for name in names if name.strip()]
    elif kind.startswith("dict"):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}={value!r} is not a mapping such as {{'hidden_size': 3584}}")
        return {str(key): _sizes(f"{where}: {option_field.name}.{key}", size) for key, size in value.items()}
    elif isinstance(value, (dict, list, bool)):
        raise UserError(f"{where}={value!r} is not a text value")
    else:
        return str(value)
    return value


def _number(where: str, value: Any, least: float | None) -> float:
    """A float; YAML reads 1e-4 as text."""
    try:
        number = float("" if isinstance(value, bool) else value)
    except (TypeError, ValueError):
        raise UserError(f"{where}={value!r} is not a number") from None
    if least is not None and not number >= least:
        raise UserError(f"{where}={value} must be at least {least:g}")
    return number


def _sizes(where: str, value: Any) -> Any:
    """A size, or a mapping of sizes (a range)."""
    if isinstance(value, Mapping):
        return {str(key): _sizes(f"{where}.{key}", size) for key, size in value.items()}
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where}={value!r} is not an integer")
    return value


def read_yaml(settings: Any, path: Path) -> None:
    """Lays a YAML file over the settings."""
    if not path.is_file():
        raise UserError(f"no such config file: {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings")
    for section, values in content.items():
        if not isinstance(values, dict):
            set_key(settings, str(section), values, str(path))
            continue
        for name, value in values.items():
            key = f"{section}.{name}"
            if key == "prune.export_config" and isinstance(value, dict):
                # Laid over the recipe hparam by hparam, as dot overrides are.
                for hparam, size in value.items():
                    set_key(settings, f"{key}.{hparam}", size, str(path))
            else:
                set_key(settings, key, value, str(path))


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parser(kind: Any = Settings) -> Parser:
    """The command line of a command's settings: a group a section, a flag a field."""
    top = Parser(
        prog=kind.PROGRAM,
        description=kind.DESCRIPTION,
        epilog="Any setting can also be given as section.name=value, e.g. "
        f"{kind.EXAMPLE}. Later wins: recipe < --config < command line.",
        allow_abbrev=False,
    )
    top.add_argument("--recipe", help="name of a file in configs/ to start from")
    top.add_argument("--config", help="YAML file laid over the recipe")
    top.add_argument("--dry-run", action="store_true", help="print the plan from the config alone and stop")
    for section in fields(kind):
        part = section.default_factory()  # type: ignore[operator,misc]
        group = top.add_argument_group(section.name, (type(part).__doc__ or "").strip())
        for f in fields(part):
            default = getattr(part, f.name)
            text = f.metadata["help"] + (
                "" if default in (None, {}, [], False, 0) else f" (default: {default})"
            )
            taken: dict[str, Any] = {"metavar": f.name.upper(), "type": str}
            if str(f.type).startswith("bool"):
                taken = {"nargs": "?", "const": "true", "metavar": "true|false"}
            dest = f"{section.name}.{f.name}"
            group.add_argument(*f.metadata["flags"], dest=dest, default=None, help=text, **taken)
    return top


def from_command_line(
    arguments: Sequence[str],
    kind: type[Kind] = Settings,  # type: ignore[assignment]
) -> tuple[Kind, argparse.Namespace]:
    """Settings out of recipe, config file, flags and dot overrides, in this order.

    Args:
        kind: the dataclass of the command's settings, one dataclass a section.

    Raises:
        UserError: whatever is wrong with any of them.
    """
    top = parser(kind)
    switches = {flag for action in top._actions if action.nargs == "?" for flag in action.option_strings}
    words = list(arguments)
    for place, word in enumerate(words):
        # A bare switch must not take the dot override after it for its value.
        if word in switches and "=" in "".join(words[place + 1 : place + 2]):
            words[place] = f"{word}=true"
    known, rest = top.parse_known_args(words)
    flags = [flag for action in top._actions for flag in action.option_strings]
    settings = kind()
    if known.recipe:
        names = sorted(path.stem for path in kind.RECIPES.glob("*.yaml"))
        if known.recipe not in names:
            raise UserError(
                f"--recipe {known.recipe!r} is not in {kind.RECIPES.name}/{nearest(known.recipe, names)}; "
                f"recipes: {', '.join(names)}"
            )
        read_yaml(settings, kind.RECIPES / f"{known.recipe}.yaml")
    if known.config:
        read_yaml(settings, Path(known.config))
    for key, text in vars(known).items():
        if "." in key and text is not None:
            flag = next(a.option_strings[0] for a in top._actions if a.dest == key)
            set_key(settings, key, _value(text, flag, key, kind), flag)
    for word in rest:
        key, equals, text = word.partition("=")
        if word.startswith("-") or not equals:
            raise UserError(f"unknown argument {word!r}{nearest(key, flags)}; see --help")
        set_key(settings, key, _value(text, word, key, kind), "command line")
    return settings, known


def _value(text: str, where: str, key: str, kind: Any) -> Any:
    if key in ("prune.export_config", "search.space"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not valid JSON ({error}): {text}") from error
    if _is_text(key, kind):
        return None if text == "null" else text  # a folder named 2026_01 is no number
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: cannot read the value {text!r}") from error


def _is_text(key: str, kind: Any) -> bool:
    section, _, name = key.partition(".")
    parts = {f.name: f.default_factory for f in fields(kind)}  # type: ignore[misc]
    kinds = {f.name: str(f.type) for f in fields(parts[section])} if section in parts else {}  # type: ignore[arg-type]
    return kinds.get(name, "").startswith("str")
