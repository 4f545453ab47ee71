"""Configuration of a training run: five typed sections whose keys and values are validated.

Sources of values, in increasing priority: the defaults below, a TOML file, `--set section.key=value`.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from fusedkv_ext.errors import ConfigError


@dataclass(frozen=True)
class ModelSection:
    """The decoder. Names are those of `DecoderConfig`; the vocabulary size comes from the tokenizer."""

    plan: str = "fusedkv"  # a name of CachePlan.named, or the JSON file of a plan
    plan_options: dict[str, Any] = field(default_factory=dict)  # options of CachePlan.named
    num_hidden_layers: int = 8
    hidden_size: int = 256
    intermediate_size: int = 0  # 0: 8/3 of hidden_size, rounded up to a multiple of 64
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 64
    max_position_embeddings: int = 8192
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    qk_norm: bool = True
    attention_bias: bool = False
    tie_word_embeddings: bool = True
    sliding_window: int | None = None
    layer_types: list[str] = field(default_factory=list)  # repeated over the layers; empty: see DecoderConfig
    recompute_fusion: bool = False  # recompute fused keys and values in the backward instead of saving them
    # Multi-head latent attention: set all of these (q_lora_rank is optional) or none. head_dim is unused.
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    num_experts: int = 0  # 0: a dense feed-forward network
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 0  # 0: intermediate_size / num_experts_per_tok
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.001
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class DataSection:
    """Source of the tokens. If `text` is empty, the Python sources of this machine."""

    text: list[str] = field(default_factory=list)
    # If empty, files of `text` are held out by the hash of their name.
    valid_text: list[str] = field(default_factory=list)
    valid_fraction: float = 0.02
    tokenizer: str = ""  # a tokenizer.json; empty: bytes
    vocab_size: int = 0  # expected size of the tokenizer's vocabulary, within 10 %; 0: any
    seq_len: int = 256
    document_masks: bool = False  # attention and targets stay within a document
    cache_dir: str = ""  # empty: $XDG_CACHE_HOME/fusedkv


@dataclass(frozen=True)
class OptimSection:
    """AdamW with a cosine schedule and linear warm-up."""

    lr: float = 1e-3
    final_lr: float = 0.1  # last learning rate as a fraction of `lr`
    warmup_steps: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping


@dataclass(frozen=True)
class RunSection:
    """Length, batch size, seed, device, and intervals of logging, validation and checkpoints."""

    steps: int = 1000
    batch_size: int = 16  # sequences per optimizer step
    accumulate: int = 1  # micro-batches per optimizer step; batch_size must be a multiple
    seed: int = 0
    precision: str = "fp32"  # or "bf16": autocast with fp32 weights
    device: str = "auto"  # "cuda" if available, else "cpu"
    log_every: int = 10
    valid_every: int = 200
    valid_batches: int = 16
    save_every: int = 200
    keep: int = 2  # checkpoints to keep
    # Probability that a layer attends to an earlier layer's keys and values in a step (R-CLA); plan vanilla.
    random_sources: float = 0.0


@dataclass(frozen=True)
class ParallelSection:
    """Parallelism under torchrun, as in `distributed.Layout`, activation checkpointing and compilation."""

    dp_replicate: int = 1  # replicas of the weights
    dp_shard: int = 0  # ranks that shard a replica (FSDP), with own sequences; 0: all remaining ranks
    cp: int = 1  # context parallel ranks, which shard the tokens of a sequence
    tp: int = 1  # tensor parallel ranks, which shard the heads
    activation_checkpointing: str = "none"  # or "non_reentrant", "reentrant"
    compile: bool = False  # torch.compile of each layer


@dataclass(frozen=True)
class TrainConfig:
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    optim: OptimSection = field(default_factory=OptimSection)
    run: RunSection = field(default_factory=RunSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)

    def __post_init__(self) -> None:
        _validate(self)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Creates a configuration from nested sections, as read from TOML or JSON.

        Raises:
            ConfigError: A key is unknown, or a value has the wrong type or is out of range.
        """
        return cls().merged(values)

    def merged(self, values: Mapping[str, Any]) -> TrainConfig:
        """Returns a copy updated with the values of nested sections."""
        return self.updated(_flatten(values).items())

    def updated(self, items: Iterable[tuple[str, Any]], *, as_text: bool = False) -> TrainConfig:
        """Returns a copy with dotted keys replaced.

        Args:
            items: Pairs of dotted key and value.
            as_text: Values are strings and are parsed as the type of the key.

        Raises:
            ConfigError: A key is unknown, or a value has the wrong type or is out of range.
        """
        sections: dict[str, dict[str, Any]] = {}
        for key, value in items:
            section, name, rest = _locate(key)
            hint = get_type_hints(type(getattr(self, section)))[name]
            changed = sections.setdefault(section, {})
            if rest:
                options = dict(changed.get(name, getattr(getattr(self, section), name)))
                options[rest] = literal(value) if as_text else value
                changed[name] = options
            else:
                changed[name] = _coerce(key, value, hint, as_text)
        return replace(self, **{s: replace(getattr(self, s), **changed) for s, changed in sections.items()})


def known_keys() -> list[str]:
    """All dotted keys, in the order of definition."""
    hints = get_type_hints(TrainConfig)
    return [f"{section}.{item.name}" for section, kind in hints.items() for item in fields(kind)]


def load_toml(path: str | Path) -> dict[str, Any]:
    """Reads a TOML file into nested dictionaries. Python 3.10 needs the package tomli.

    Raises:
        ConfigError: The file does not exist or is not valid TOML, or tomli is missing.
    """
    try:
        import tomllib
    except ModuleNotFoundError:
        try:
            import tomli as tomllib
        except ModuleNotFoundError as error:
            raise ConfigError(
                "reading TOML on Python 3.10 needs the package tomli: pip install tomli"
            ) from error
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"--config: {path} does not exist") from error
    except ValueError as error:
        raise ConfigError(f"--config: {path} is not valid TOML: {error}") from error


def _flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, content in values.items():
        if not isinstance(content, Mapping):
            raise unknown_key(section)
        if section not in _sections() and not content:  # otherwise `_locate` reports its keys
            raise unknown_key(section)
        flat.update({f"{section}.{name}": value for name, value in content.items()})
    return flat


def unknown_key(key: str) -> ConfigError:
    """The error for an unknown key, with similar keys as a hint."""
    names = known_keys()
    last = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.6)
    near += [name for name in names if difflib.get_close_matches(last, [name.split(".")[1]], cutoff=0.75)]
    unique = list(dict.fromkeys(near))[:3]
    hint = f"did you mean {' or '.join(unique)}?" if unique else f"sections are {', '.join(_sections())}"
    return ConfigError(f"unknown configuration key {key!r}; {hint}")


def _sections() -> list[str]:
    return [item.name for item in fields(TrainConfig)]


def _locate(key: str) -> tuple[str, str, str]:
    """Splits a dotted key into section, name, and key inside a table or ''."""
    section, _, rest = key.partition(".")
    name, _, inner = rest.partition(".")
    if f"{section}.{name}" not in known_keys():
        raise unknown_key(key)
    kind = get_type_hints(get_type_hints(TrainConfig)[section])[name]
    if inner and get_origin(kind) is not dict:
        raise unknown_key(key)
    return section, name, inner


def literal(text: str) -> Any:
    """Parses a value of unknown type: JSON if valid (numbers, true, null, lists), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _type_name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("none" if arm is type(None) else _type_name(arm) for arm in get_args(hint))
    if get_origin(hint) is list:
        return "a list of integers" if get_args(hint) == (int,) else "a list of texts"
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}.get(hint, "a table")


def _coerce(key: str, value: Any, hint: Any, as_text: bool) -> Any:
    arms = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    for arm in arms:
        try:
            return _from_text(value, arm) if as_text else _from_value(value, arm)
        except (ValueError, TypeError):
            continue
    raise ConfigError(f"{key} must be {_type_name(hint)}, got {value!r}")


_TRUTH = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


def _from_text(text: str, kind: Any) -> Any:
    if kind is bool:
        return _from_value(_TRUTH.get(text.lower()), bool)
    if kind in (int, float, str):
        return kind(text)
    if kind is type(None) and text.lower() == "none":
        return None
    if get_origin(kind) is list:
        return [_from_text(part.strip(), *get_args(kind)) for part in text.split(",") if part.strip()]
    return _from_value(literal(text), kind)


def _from_value(value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = get_origin(kind) or kind
    if not isinstance(value, expected) or (kind is int and isinstance(value, bool)):
        raise TypeError
    return [_from_value(part, *get_args(kind)) for part in value] if expected is list else value


# (key, test, expectation). `_validate` checks limits that involve two keys.
_LIMITS: tuple[tuple[str, Any, str], ...] = (
    *(
        (f"model.{name}", lambda value: value >= 1, ">= 1")
        for name in (
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )
    ),
    *(
        (f"model.{name}", lambda value: value >= 0, ">= 0")
        for name in ("intermediate_size", "num_experts", "moe_intermediate_size")
    ),
    ("data.vocab_size", lambda value: value >= 0, ">= 0"),
    ("data.seq_len", lambda value: value >= 2, ">= 2"),
    ("data.valid_fraction", lambda value: 0 < value < 1, "between 0 and 1"),
    ("optim.lr", lambda value: 0 < value < float("inf"), "> 0"),
    ("optim.final_lr", lambda value: 0 <= value <= 1, "from 0 to 1"),
    ("optim.warmup_steps", lambda value: value >= 0, ">= 0"),
    ("optim.weight_decay", lambda value: value >= 0, ">= 0"),
    ("optim.beta1", lambda value: 0 <= value < 1, "in [0, 1)"),
    ("optim.beta2", lambda value: 0 <= value < 1, "in [0, 1)"),
    ("optim.eps", lambda value: value > 0, "> 0"),
    ("optim.grad_clip", lambda value: value >= 0, ">= 0"),
    ("run.seed", lambda value: 0 <= value < 2**63, "from 0 to 2^63 - 1"),
    ("run.random_sources", lambda value: 0 <= value <= 1, "from 0 to 1"),
    ("run.precision", lambda value: value in ("fp32", "bf16"), '"fp32" or "bf16"'),
    *((f"parallel.{name}", lambda value: value >= 1, ">= 1") for name in ("dp_replicate", "cp", "tp")),
    ("parallel.dp_shard", lambda value: value >= 0, ">= 0"),
    (
        "parallel.activation_checkpointing",
        lambda value: value in ("none", "reentrant", "non_reentrant"),
        '"none", "reentrant" or "non_reentrant"',
    ),
    *(
        (f"run.{name}", lambda value: value >= 1, ">= 1")
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "valid_every",
            "valid_batches",
            "save_every",
            "keep",
        )
    ),
)


def _validate(config: TrainConfig) -> None:
    for key, allowed, expected in _LIMITS:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if not allowed(value):
            raise ConfigError(f"{key} must be {expected}, got {value!r}")
    if config.run.batch_size % config.run.accumulate:
        raise ConfigError(
            f"run.batch_size must be a multiple of run.accumulate ({config.run.accumulate}), got "
            f"{config.run.batch_size}"
        )
    if config.parallel.cp > 1 and config.data.seq_len % (2 * config.parallel.cp):
        raise ConfigError(
            f"data.seq_len must be a multiple of 2 x parallel.cp ({2 * config.parallel.cp}), got "
            f"{config.data.seq_len}: each rank has two chunks of a sequence"
        )
    if config.data.seq_len > config.model.max_position_embeddings:
        raise ConfigError(
            "data.seq_len must be at most model.max_position_embeddings "
            f"({config.model.max_position_embeddings}), got {config.data.seq_len}"
        )
