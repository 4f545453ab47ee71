"""Whole decoders of both devices: how they are made and how they are checked."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.layers import attention
from fusedkv_ext.ops import reference
from fusedkv_ext.testing import assert_close

PLANS = ("vanilla", "fusedkv-lite", "fusedkv")
CHECK_TOKENS = 48


def build(shape: dict[str, Any], plan: str, dtype: torch.dtype = torch.float32) -> fkv.Decoder:
    torch.manual_seed(1)
    # As outside of a benchmark. Parameters made in inference mode would have no versions, by which FusedKV
    # knows that its weights are still those that it put in order before.
    with torch.inference_mode(False):
        return fkv.Decoder(fkv.DecoderConfig(**shape, plan=plan)).to(dtype)


@torch.inference_mode(False)
def check_logits(model: fkv.Decoder, result: object = None, steps: int = 1) -> None:
    """A prompt and ``steps`` tokens out of a cache, against the model in float64 without one. The same math
    in the working dtype: the model without a cache, attending as the oracle does.

    result: not looked at; weights and prompt of what is timed are random, and what it returns is a token.
    """
    ids = _tokens(model)
    with torch.no_grad(), mock.patch.object(attention, "fused_kv_attn_func", _oracle_attention):
        exact = copy.deepcopy(model).double()(ids)[:, -1 - steps :]
        same = model(ids)[:, -1 - steps :]
    with torch.inference_mode():
        cache = model.make_cache(1, CHECK_TOKENS)
        parts = [model(ids[:, :-steps], cache=cache, logits_to_keep=1)]
        parts += [model(ids[:, i : i + 1], cache=cache) for i in range(CHECK_TOKENS - steps, CHECK_TOKENS)]
        got = torch.cat(parts, dim=1)
    assert_close(got, exact, same, f"decoder with plan {model.plan.name}, {got.dtype}", terms=CHECK_TOKENS)


def _tokens(model: fkv.Decoder) -> Tensor:
    device = model.lm_head.weight.device
    return torch.randint(model.config.vocab_size, (1, CHECK_TOKENS), device=device)


@torch.inference_mode(False)
def check_gradients(model: fkv.Decoder, result: object = None) -> None:
    """Loss and gradients of a training step against float64; the same math: the oracle's attention."""
    ids = _tokens(model)

    def gradients(model: fkv.Decoder) -> list[Tensor]:
        _, loss = model(ids, labels=ids)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    got = gradients(model)
    with mock.patch.object(attention, "fused_kv_attn_func", _oracle_attention):
        exact, same = gradients(copy.deepcopy(model).double()), gradients(model)
    assert_close(got, exact, same, f"training with plan {model.plan.name}", terms=CHECK_TOKENS)


def _oracle_attention(*args: object, recompute_fusion: bool = False, **options: object) -> Tensor:
    return reference.fused_kv_attn_func(*args, **options)
