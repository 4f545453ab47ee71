"""Mixture of experts: against a loop over tokens, its balance loss, and inside the decoder."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import LAYERS, PLANS, hybrid, tiny_config, tiny_decoder
from torch import Tensor

from fusedkv_ext.checkpoint.pretrained import load_pretrained, save_pretrained
from fusedkv_ext.layers.decoder import Decoder
from fusedkv_ext.layers.fusion import param_groups
from fusedkv_ext.layers.moe import MoE, balance_loss
from fusedkv_ext.testing import assert_near

ROUNDINGS = 64
HIDDEN, INTER, E, K = 16, 24, 6, 2
EXPERTS = dict(num_experts=E, num_experts_per_tok=K)


@pytest.fixture(autouse=True)
def one_thread(with_threads: Callable[[int], None]) -> None:
    """Tensors are so small here that a second thread would only be waited for."""
    with_threads(1)


def some_moe(norm_topk_prob: bool = True, k: int = K, experts: int = E, hidden: int = HIDDEN) -> MoE:
    """Weights large enough for probabilities far from uniform."""
    moe = MoE(hidden, INTER, experts, k, norm_topk_prob)
    for weight in moe.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return moe


def by_definition(moe: MoE, x: Tensor) -> Tensor:
    """Token by token and expert by expert."""
    outs = []
    for token in x.flatten(0, 1):
        probabilities = torch.softmax(moe.gate.weight @ token, dim=0)
        top = torch.topk(probabilities, moe.num_experts_per_tok)
        total = top.values.sum() if moe.norm_topk_prob else 1
        out = torch.zeros_like(token)
        for p, e in zip(top.values, top.indices.tolist(), strict=True):
            gate, up = moe.experts.gate_up_proj[e].split(INTER)
            out = out + p / total * (moe.experts.down_proj[e] @ (F.silu(gate @ token) * (up @ token)))
        outs.append(out)
    return torch.stack(outs).view_as(x)


@pytest.mark.parametrize("norm", [True, False], ids=["renormalized", "as they are"])
@pytest.mark.parametrize(("k", "experts"), [(1, 1), (1, 4), (2, 6), (3, 3), (2, 40)])
def test_output_and_gradients_are_those_of_the_definition(k: int, experts: int, norm: bool) -> None:
    moe = some_moe(norm, k, experts).double()
    x = torch.randn(2, 7, HIDDEN, dtype=torch.float64, requires_grad=True)
    out, expected = moe(x)[0], by_definition(moe, x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    toward = torch.randn_like(out)
    inputs = (x, *moe.parameters())
    found = torch.autograd.grad(out, inputs, toward)
    # With one expert, renormalized, the router has no say.
    wanted = torch.autograd.grad(expected, inputs, toward, allow_unused=True, materialize_grads=True)
    for name, a, b in zip(("x", *dict(moe.named_parameters())), found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("hidden", [HIDDEN, 20], ids=["grouped", "looped"])
def test_bf16_is_within_its_rounding(hidden: int) -> None:
    """Both ways to multiply: torch's grouped product, and a loop where rows are no multiples of 16 bytes."""
    moe = some_moe(hidden=hidden).bfloat16()
    x = torch.randn(2, 9, hidden, dtype=torch.bfloat16, requires_grad=True)
    exact = some_moe(hidden=hidden).double()
    exact.load_state_dict(moe.state_dict())
    exact_x = x.detach().double().requires_grad_()
    out, expected = moe(x)[0], exact(exact_x)[0]
    toward = torch.randn_like(out)
    out.backward(toward)
    expected.backward(toward.double())
    assert out.dtype == torch.bfloat16
    for a, b in (
        (out, expected),
        (x.grad, exact_x.grad),
        (moe.gate.weight.grad, exact.gate.weight.grad),
        (moe.experts.gate_up_proj.grad, exact.experts.gate_up_proj.grad),
        (moe.experts.down_proj.grad, exact.experts.down_proj.grad),
    ):
        assert (a.double() - b).norm() < 0.02 * b.norm()


def test_equal_experts_are_one_dense_network() -> None:
    dense, sparse = (tiny_decoder("fusedkv", **changes).double() for changes in ({}, EXPERTS))
    dense = Decoder(tiny_config("fusedkv", intermediate_size=24)).double()  # as one expert has
    state = {name: x for name, x in dense.state_dict().items() if ".mlp." not in name}
    sparse.load_state_dict(state, strict=False)
    for there, here in zip(dense.model.layers, sparse.model.layers, strict=True):
        gate_up = torch.cat((there.mlp.gate_proj.weight, there.mlp.up_proj.weight))
        with torch.no_grad():
            here.mlp.experts.gate_up_proj.copy_(gate_up.expand(E, -1, -1))
            here.mlp.experts.down_proj.copy_(there.mlp.down_proj.weight.expand(E, -1, -1))
    ids = torch.randint(0, 61, (2, 9))
    torch.testing.assert_close(sparse(ids), dense(ids), rtol=1e-10, atol=1e-10)


def test_ties_pick_k_different_experts_of_equal_weight() -> None:
    moe = some_moe(k=2, experts=4).double()
    torch.nn.init.zeros_(moe.gate.weight)
    x = torch.randn(1, 3, HIDDEN, dtype=torch.float64)
    alone = []
    for e in range(4):
        one = MoE(HIDDEN, INTER, 1, 1).double()
        one.load_state_dict(
            {"gate.weight": torch.zeros(1, HIDDEN)}
            | {f"experts.{name}": weight[e : e + 1] for name, weight in moe.experts.named_parameters()}
        )
        alone.append(one(x)[0])
    pairs = torch.stack([(a + b) / 2 for a, b in itertools.combinations(alone, 2)])
    distance = (pairs - moe(x)[0]).abs().amax(dim=-1)  # (pairs, 1, tokens)
    assert distance.amin(dim=0).max() < 1e-12


def test_experts_without_tokens_get_no_gradient_and_change_nothing() -> None:
    moe = some_moe()
    with torch.no_grad():
        moe.gate.weight[3] = -100 * torch.ones(HIDDEN)
    x = torch.rand(1, 5, HIDDEN) + 0.5  # so that expert 3 is the last choice of every token
    out = moe(x)[0]
    out.sum().backward()
    for weight in moe.experts.parameters():
        assert not weight.grad[3].any() and weight.grad.any()
    with torch.no_grad():
        for weight in moe.experts.parameters():
            weight[3] = torch.nan
        assert torch.equal(moe(x)[0], out)


def test_no_tokens_are_no_rows() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert some_moe().to(dtype)(torch.zeros(2, 0, HIDDEN, dtype=dtype))[0].shape == (2, 0, HIDDEN)


def test_bf16_needs_no_numbers_on_the_host() -> None:
    """What lets a CUDA graph hold a decoding step. A meta tensor has no numbers that could be read."""
    moe, x = some_moe().to("meta"), torch.empty(2, 1, HIDDEN, device="meta")
    assert moe.bfloat16()(x.bfloat16())[0].shape == x.shape
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        moe.float()(x)


def test_autocast_computes_in_its_dtype_and_keeps_fp32_gradients() -> None:
    moe, x = some_moe(), torch.randn(2, 9, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        out, balance = moe(x)
        exact = some_moe().bfloat16()
        exact.load_state_dict(moe.state_dict())
        torch.testing.assert_close(out, exact(x.bfloat16())[0])
    assert out.dtype == torch.bfloat16 and balance.dtype == torch.float32
    (out.float().square().mean() + balance).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in moe.parameters())


# The balance loss


def test_uniform_routing_has_balance_one_and_one_expert_for_all_has_e() -> None:
    uniform = torch.full((3, E, E), 1 / E)
    in_turns = torch.stack([torch.arange(E), (torch.arange(E) + 1) % E], dim=-1).expand(3, E, 2)
    assert balance_loss(uniform, in_turns).item() == pytest.approx(1.0)
    alone = torch.zeros(3, E, E).index_fill(-1, torch.tensor(2), 1.0)
    assert balance_loss(alone, torch.full((3, E, 1), 2)).item() == pytest.approx(E)


def test_balance_loss_is_the_sum_written_out_per_sequence() -> None:
    probabilities = torch.randn(3, 5, E, dtype=torch.float64).softmax(-1)
    experts = probabilities.topk(K).indices
    total = 0.0
    for b in range(3):
        for e in range(E):
            used = (experts[b] == e).sum().item() / (5 * K)
            total += E * used * probabilities[b, :, e].mean().item() / 3
    assert balance_loss(probabilities, experts).item() == pytest.approx(total, rel=1e-12)


def test_descending_the_balance_loss_spreads_the_tokens() -> None:
    moe, x = some_moe(), torch.randn(4, 32, HIDDEN) + 1  # the mean gives some experts most of the tokens

    def busiest() -> float:
        chosen = moe.gate(x).topk(K).indices
        return torch.bincount(chosen.flatten(), minlength=E).max().item() / chosen.numel()

    before, optimizer = busiest(), torch.optim.SGD(moe.gate.parameters(), lr=0.3)
    first = moe(x)[1].item()
    for _ in range(100):
        optimizer.zero_grad()
        balance = moe(x)[1]
        balance.backward()
        optimizer.step()
    assert balance.item() < 1.05 < first
    assert busiest() < before and busiest() < 1.5 / E


def test_loss_is_cross_entropy_plus_the_mean_balance_in_training_only() -> None:
    model = tiny_decoder("fusedkv", **EXPERTS, router_aux_loss_coef=0.5, mlp_only_layers=(1,))
    ids, balances = torch.randint(0, 61, (2, 9)), []
    for i in (0, 2, 3):
        model.model.layers[i].mlp.register_forward_hook(lambda _m, _args, out: balances.append(out[1]))
    assert not isinstance(model.model.layers[1].mlp, MoE)
    logits, loss = model(ids, labels=ids)
    entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, entropy + 0.5 * torch.stack(balances).mean())
    assert len(balances) == 3 and torch.stack(balances).min() > 0.5
    model.eval()
    torch.testing.assert_close(model(ids, labels=ids)[1], entropy)
    assert balances[3:] == [None] * 3


def test_loss_and_gradient_do_not_depend_on_how_the_batch_is_cut() -> None:
    model = tiny_decoder("yoco", **EXPERTS, router_aux_loss_coef=0.5).double()
    ids = torch.randint(0, 61, (4, 9))
    results = []
    for parts in (1, 2, 4):
        model.zero_grad()
        loss = sum(model(part, labels=part)[1] / parts for part in ids.chunk(parts))
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    for loss, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-12, atol=0)
        torch.testing.assert_close(grads, results[0][1], rtol=1e-9, atol=1e-12)


# In the decoder

PLANS_WITH_EXPERTS = ("vanilla", "fusedkv", "fusedkv-lite", "cla", "skipv1", "yoco++")


@pytest.mark.parametrize("plan", PLANS_WITH_EXPERTS)
def test_cached_in_pieces_is_the_full_pass(plan: str) -> None:
    model = tiny_decoder(plan, **EXPERTS, **hybrid(plan))
    ids = torch.randint(0, 61, (2, 12))
    with torch.no_grad():
        full, cache = model(ids), model.make_cache(2, 12, page_size=4)
        pieces = [model(piece, cache=cache) for piece in ids.split([6, 2, 1, 1, 1, 1], dim=1)]
    assert_near(torch.cat(pieces, dim=1), full, ROUNDINGS)


@pytest.mark.parametrize("plan", PLANS_WITH_EXPERTS)
def test_early_exit_is_exact(plan: str) -> None:
    model = tiny_decoder(plan, **EXPERTS, **hybrid(plan)).double()
    ids = torch.randint(0, 61, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, logits_to_keep=2), model(ids)[:, -2:], rtol=1e-12, atol=1e-12)
    rows = []
    model.model.layers[-1].mlp.experts.register_forward_hook(lambda _m, args, _out: rows.append(len(args[0])))
    model(ids, logits_to_keep=2)
    assert rows == [2 * K * (12 if PLANS[plan].prefill_layers > LAYERS else 2)]


@pytest.mark.parametrize("plan", ["vanilla", "fusedkv", "yoco++"])
def test_greedy_tokens_do_not_depend_on_the_cache(plan: str) -> None:
    model = tiny_decoder(plan, **EXPERTS, **hybrid(plan))
    prompts = [torch.randint(1, 61, (length,)) for length in (7, 1, 4)]
    slow = model.generate(prompts, 8, use_cache=False)
    for page_size in (None, 4):
        assert torch.equal(model.generate(prompts, 8, page_size=page_size), slow)


def test_names_and_shapes_are_those_of_qwen3_moe() -> None:
    model = Decoder(tiny_config("fusedkv", **EXPERTS, moe_intermediate_size=40, decoder_sparse_step=2))
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items() if ".mlp." in name}
    expected = {}
    for i in range(LAYERS):
        layer = f"model.layers.{i}.mlp"
        if i % 2:
            expected |= {f"{layer}.gate.weight": (E, 32), f"{layer}.experts.gate_up_proj": (E, 80, 32)}
            expected |= {f"{layer}.experts.down_proj": (E, 32, 40)}
        else:
            expected |= {f"{layer}.{name}_proj.weight": (48, 32) for name in ("gate", "up")}
            expected |= {f"{layer}.down_proj.weight": (32, 48)}
    assert shapes == expected


def test_an_expert_is_by_default_its_share_of_the_dense_network() -> None:
    assert tiny_config("yoco", **EXPERTS).moe_intermediate_size == 48 // K
    assert tiny_config("yoco").moe_intermediate_size is None


def test_experts_start_and_decay_like_matrices() -> None:
    model = Decoder(tiny_config("fusedkv", **EXPERTS, hidden_size=64, initializer_range=0.1))
    moe = model.model.layers[0].mlp
    for weight in moe.parameters():
        assert weight.std().item() == pytest.approx(0.1, rel=0.1)
    decaying = {id(p) for p in param_groups(model, 0.1)[0]["params"]}
    assert all(id(weight) in decaying for weight in moe.parameters())
    model.reset_parameters(torch.Generator().manual_seed(5))
    drawn = [weight.clone() for weight in moe.parameters()]
    model.reset_parameters(torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(drawn, moe.parameters(), strict=True))


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = tiny_decoder("fusedkv", **EXPERTS, **hybrid("fusedkv"), mlp_only_layers=(0,))
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.config == model.config
    ids = torch.randint(0, 61, (2, 9))
    assert torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["looped", "grouped"])
def test_compiled_is_the_same(dtype: torch.dtype) -> None:
    """The grouped product fits into one graph; the loop reads numbers and breaks it, and nothing else."""
    moe, x = some_moe().to(dtype), torch.randn(2, 9, HIDDEN, dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=dtype is torch.bfloat16)
    for tokens in (9, 4, 1):
        (out, balance), (expected, same) = compiled(x[:, :tokens]), moe(x[:, :tokens])
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(balance, same)
        (out.float().sum() + balance).backward()
