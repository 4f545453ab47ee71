"""Tested releases of transformers, PEFT, accelerate and torch; differences between those of transformers."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from packaging.version import Version
from transformers.models.llama import modeling_llama

__all__ = ["CACHE", "TESTED", "check_keywords", "takes_cache", "untested", "warn_if_untested"]

# Oldest and newest minor release. None: the oldest is what transformers itself asks for.
TESTED = {
    "transformers": ("5.17", "5.24"),
    "torch": ("2.11", "2.14"),
    "peft": (None, "0.21"),
    "accelerate": (None, "1.15"),
}

_OLD_CACHE = "past_key_values"
# The keyword by which models, layers and attention get the cache: "cache" since transformers 5.24.
_arguments = inspect.signature(modeling_llama.LlamaAttention.forward).parameters
CACHE = "cache" if "cache" in _arguments else _OLD_CACHE

# Keywords that transformers passes to attention in addition to the arguments that attention names.
_KEYWORDS = {
    "cache_position",  # which transformers itself ignores since 5.0
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "is_causal",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "seq_idx",
    "use_cache",
    # of the loss
    "ignore_index",
    "shift_labels",
    # continuous batching; up to 5.23 with its own cache as "cache"
    "block_table",
    "cache",
    "logits_indices",
    "logits_processor_args",
    "max_seqlen_k",
    "max_seqlen_q",
    "read_index",
    "write_index",
}


def check_keywords(kwargs: dict[str, Any], where: str, also: frozenset[str] = frozenset()) -> None:
    """Rejects unknown keywords of attention that are not None.

    They may change the result: a cache under a new name, a bias of the scores.

    Raises:
        ValueError: there is such a keyword.
    """
    for name in kwargs.keys() - _KEYWORDS - also:
        if kwargs[name] is not None:
            raise ValueError(
                f"{where} does not know the keyword argument {name!r}, which may change the result; leave it "
                'out, use another attn_implementation such as "eager", or install a tested release of '
                f"transformers ({' to '.join(map(str, TESTED['transformers']))})"
            )


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Renames the argument ``past_key_values`` of a method to ``CACHE``, also in its signature.

    The old name is still accepted, with transformers' FutureWarning.
    """
    if CACHE == _OLD_CACHE:
        return forward

    @functools.wraps(forward)
    def renamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        old = kwargs.get(_OLD_CACHE)
        if old is not None and not torch.compiler.is_compiling():
            message = f"`{_OLD_CACHE}` is deprecated since transformers 5.24; use `{CACHE}` instead"
            warnings.warn(message, FutureWarning, stacklevel=2)
        if CACHE in kwargs:
            cache = kwargs.pop(CACHE)
            if old is None:
                kwargs[_OLD_CACHE] = cache
            elif cache is not None and cache is not old:
                raise TypeError(
                    f"{CACHE} must be given once, got also {_OLD_CACHE}, its old name; pass {CACHE} alone"
                )
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    parameters = [x.replace(name=CACHE) if x.name == _OLD_CACHE else x for x in signature.parameters.values()]
    renamed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return renamed


def untested(name: str, found: str) -> str | None:
    """The warning about release ``found`` of a package of ``TESTED``; None if it was tested.

    Patch releases of a tested minor release count as tested.
    """
    oldest, newest = TESTED[name]
    release = Version(found).release[:2]
    if release <= Version(newest).release and (oldest is None or release >= Version(oldest).release):
        return None
    tested = f"{oldest} to {newest}" if oldest else f"releases up to {newest}"
    return (
        f"fusedkv_ext.hf was never tested with {name} {found}, but with {tested}; compare a few tokens of "
        f"generate with those of use_cache=False, or install a tested release"
    )


def warn_if_untested() -> None:
    """Gives a UserWarning for each installed package of ``TESTED`` whose release was not tested."""
    for name in TESTED:
        try:
            message = untested(name, version(name))
        except PackageNotFoundError:  # PEFT and accelerate need not be there
            continue
        if message:
            warnings.warn(message, UserWarning, stacklevel=2)
