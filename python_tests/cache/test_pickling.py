"""What users pickle, copy, save and send to processes behaves like the original."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from tiny import PLANS, tiny_config, tiny_decoder, tiny_run
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.cache.page_table import PageTable
from fusedkv_ext.generation.sampling import Sampling

LATENT = dict(kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, head_dim=None)
CASES = [("vanilla", False), ("fusedkv", False), ("patchwork", False), ("vanilla", True), ("fusedkv", True)]
TOKENS, NEW = 7, 3


def saved(x: object) -> object:
    buffer = io.BytesIO()
    torch.save(x, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(x: object) -> object:
    return pickle.loads(pickle.dumps(x))


WAYS = {"pickle": pickled, "deepcopy": copy.deepcopy, "save": saved}
Again = Callable[[object], object]


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def again(request: pytest.FixtureRequest) -> Again:
    return request.param


def decoder(plan: str, latent: bool) -> fkv.Decoder:
    return tiny_decoder(plan, **(LATENT if latent else {})).eval()


def decoded(model: fkv.Decoder, ids: Tensor, cache: fkv.KVCache) -> Tensor:
    """Logits of the last NEW tokens, one at a time."""
    return torch.cat([model(ids[:, i : i + 1], cache=cache) for i in range(TOKENS, TOKENS + NEW)], dim=1)


@pytest.mark.parametrize("page_size", [None, 4], ids=["contiguous", "paged"])
@pytest.mark.parametrize(("plan", "latent"), CASES)
@torch.no_grad()
def test_a_cache_goes_on_decoding(plan: str, latent: bool, page_size: int | None, again: Again) -> None:
    model, ids = decoder(plan, latent), torch.randint(61, (2, TOKENS + NEW))
    cache = model.make_cache(batch_size=2, max_len=16, page_size=page_size)
    model(ids[:, :TOKENS], cache=cache)
    twin = again(cache)
    expected = model(ids)[:, TOKENS:]
    torch.testing.assert_close(decoded(model, ids, twin), expected, rtol=1e-4, atol=1e-4)
    assert cache.lengths == (TOKENS, TOKENS) and twin.lengths == (TOKENS + NEW, TOKENS + NEW)
    assert twin.nbytes == cache.nbytes
    if latent:
        layer = twin.plan.storage_layers[0]
        storages = [x.untyped_storage().data_ptr() for x in (twin.values(layer), twin.keys(layer))]
        assert storages[0] == storages[1]
    # The original has not been written to.
    torch.testing.assert_close(decoded(model, ids, cache), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_pickled_cache_takes_no_tables_and_no_modules_with_it() -> None:
    model, ids = decoder("vanilla", False), torch.randint(61, (1, TOKENS))
    cache = model.make_cache(batch_size=1, max_len=16)
    empty = len(pickle.dumps(cache))
    model(ids, cache=cache)
    assert cache._rotary and abs(len(pickle.dumps(cache)) - empty) < 64
    assert not pickle.loads(pickle.dumps(cache))._rotary


@torch.no_grad()
def test_a_model_and_its_cache_travel_together(again: Again) -> None:
    model, ids = decoder("fusedkv", True), torch.randint(61, (1, TOKENS + NEW))
    cache = model.make_cache(batch_size=1, max_len=16)
    expected = model(ids)[:, TOKENS:]
    model(ids[:, :TOKENS], cache=cache)
    twin, its_cache = again((model, cache))
    torch.testing.assert_close(decoded(twin, ids, its_cache), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("plan", "latent"), [("patchwork", False), ("fusedkv", False), ("fusedkv", True)])
@torch.no_grad()
def test_a_model_computes_the_same_and_its_weights_are_its_own(plan: str, latent: bool, again: Again) -> None:
    model, ids = decoder(plan, latent), torch.randint(61, (2, TOKENS))
    expected = model(ids)  # keeps expanded fusion weights
    twin = again(model)
    assert torch.equal(twin(ids), expected)
    twin = again(model)
    for parameter in twin.parameters():
        parameter.data.mul_(1.5)  # counts no version: nothing may have been kept
    fresh = decoder(plan, latent)
    fresh.load_state_dict(twin.state_dict())
    assert torch.equal(twin(ids), fresh(ids)) and torch.equal(model(ids), expected)


def test_modules_compute_the_same(again: Again) -> None:
    plan = fkv.CachePlan.named("fusedkv", num_layers=4)
    rope = fkv.RotaryEmbedding(8, scaling={"rope_type": "linear", "factor": 2.0})
    rope.tables(8)
    attention = fkv.FusedKVAttention(plan, 0, 32, 4, 2, 8, rope=rope)
    weights = fkv.FusionWeights(plan, 3, 2, 8)
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        kept, twin = weights.key_weights(), again(weights)
        assert torch.equal(twin.key_weights(), kept) and twin.key_weights().data_ptr() != kept.data_ptr()
        assert torch.equal(again(attention)(x)[0], attention(x)[0])
    other = again(rope)
    for old, new in zip(rope.tables(12), other.tables(12), strict=True):
        assert torch.equal(old, new)


def test_plans_configs_and_records_are_equal(again: Again, tmp_path) -> None:
    q = torch.randn(1, 1, 4, 8)
    caches = [torch.randn(1, 16, 2, 8)]
    lengths = torch.tensor([16], dtype=torch.int32)
    explanation = fkv.explain(q, caches, caches, cache_seqlens=lengths)
    configs = [tiny_config("fusedkv"), tiny_run(tmp_path), Sampling(0.5, 3, 0.9)]
    for record in [*PLANS.values(), *configs, explanation]:
        twin = again(record)
        assert twin == record and repr(twin) == repr(record) and type(twin) is type(record)
    plan = PLANS["patchwork"]
    assert again(plan).segments(1, 2) == plan.segments(1, 2)
    kv = again(fkv.KV(torch.ones(2), None))
    assert isinstance(kv, fkv.KV) and torch.equal(kv.key, torch.ones(2)) and kv.value is None


def test_a_page_table_goes_on_with_its_own_pages(again: Again) -> None:
    table = PageTable(batch_size=2, page_size=4, max_pages=3, num_pages=6)
    table.extend([0, 0], [5, 3])
    table.reorder([0, 0])
    twin = again(table)
    before = table.rows.clone()
    assert twin.extend([5, 5], [6, 6]) == copy.deepcopy(table).extend([5, 5], [6, 6])
    assert torch.equal(table.rows, before) and table.num_free != twin.num_free


def test_a_decode_schedule_serves_the_same_calls(again: Again) -> None:
    q, cache = torch.randn(1, 1, 4, 8), torch.randn(1, 16, 2, 8)
    lengths = torch.tensor([9], dtype=torch.int32)
    sizes = dict(query_length=1, num_heads=4, num_kv_heads=2, capacity=16)
    schedule = fkv.decode_schedule(lengths, **sizes)
    call = lambda schedule: fkv.fused_kv_attn_with_kvcache(  # noqa: E731
        q, [cache], [cache], cache_seqlens=lengths, schedule=schedule
    )
    assert torch.equal(call(again(schedule)), call(schedule))


# Hugging Face models


@pytest.fixture(scope="module")
def hf_tiny():
    pytest.importorskip("transformers")
    import hf_tiny

    return hf_tiny


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_hf_models_and_configs(family: str, again: Again, hf_tiny) -> None:
    model, ids = hf_tiny.tiny_model(family, "fusedkv", "fusedkv"), hf_tiny.tokens(2, TOKENS)
    expected = model(ids).logits
    twin = again(model)
    assert torch.equal(twin(ids).logits, expected)
    config = again(model.config)
    assert config.to_dict() == model.config.to_dict() and type(config) is type(model.config)
    assert twin.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("plan", ["vanilla", "fusedkv", "patchwork", "yoco"])
@torch.no_grad()
def test_hf_caches_go_on_decoding(plan: str, kind: str, again: Again, hf_tiny) -> None:
    from transformers import DynamicCache, StaticCache

    model, ids = hf_tiny.tiny_model("llama", plan, "fusedkv"), hf_tiny.tokens(2, TOKENS + NEW)
    expected = model(ids).logits[:, TOKENS:]
    static = dict(config=model.config, max_cache_len=16)
    cache = StaticCache(**static) if kind == "static" else DynamicCache(config=model.config)
    model(ids[:, :TOKENS], past_key_values=cache)
    twin = again(cache)
    for own in (twin, cache):  # the original is as it was
        steps = [
            model(ids[:, i : i + 1], past_key_values=own, cache_position=torch.tensor([i])).logits
            for i in range(TOKENS, TOKENS + NEW)
        ]
        hf_tiny.close(torch.cat(steps, dim=1), expected)


def test_another_process_decodes_the_same() -> None:
    """The real way: a spawned process gets the model and the cache."""
    from concurrent.futures import ProcessPoolExecutor

    model, ids = decoder("fusedkv", True), torch.randint(61, (1, TOKENS + NEW))
    cache = model.make_cache(batch_size=1, max_len=16)
    with torch.no_grad():
        expected = model(ids)[:, TOKENS:]
        model(ids[:, :TOKENS], cache=cache)
    with ProcessPoolExecutor(1, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        got = pool.submit(_decoded_elsewhere, model, ids, cache).result(timeout=120)
    torch.testing.assert_close(torch.tensor(got), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _decoded_elsewhere(*arguments: object) -> list:
    return decoded(*arguments).tolist()
