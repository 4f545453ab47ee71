"""Operations that write into their arguments: autograd notices, and memory that is written belongs to one
element of one argument."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.ops import native, reference
from fusedkv_ext.testing import assert_same_bits

SHAPE = (2, 8, 2, 16)
LENGTHS = (8, 5)


def lengths(device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(LENGTHS, dtype=torch.int32, device=device)


def append(caches: list[Tensor]) -> None:
    new = torch.ones(2, 3, *SHAPE[2:], device=caches[0].device)
    fkv.append_kvcache(new, new, *caches, cache_seqlens=lengths(caches[0].device))


def append_directly(caches: list[Tensor]) -> None:
    new = torch.ones(2, 3, *SHAPE[2:], device=caches[0].device)
    options = (lengths(caches[0].device), None, None, None, False, None)
    native._ops.append_kvcache.default(new, new, *caches, *options)


def accumulate(buffers: list[Tensor]) -> None:
    grad = torch.ones(SHAPE, device=buffers[0].device)
    sources = [torch.ones_like(grad) for _ in buffers]
    weights = torch.ones(len(buffers), *SHAPE[2:], device=grad.device)
    fkv.fuse_kv_backward(grad, sources, weights, grad_sources=buffers)


def accumulate_directly(buffers: list[Tensor]) -> None:
    grad = torch.ones(SHAPE, device=buffers[0].device)
    sources = [torch.ones_like(grad) for _ in buffers]
    weights = torch.ones(len(buffers), *SHAPE[2:], device=grad.device)
    native._ops.fuse_kv_backward_accumulate.default(grad, sources, weights, buffers, True)


WRITES = [append, append_directly, accumulate, accumulate_directly]
Write = Callable[[list[Tensor]], None]


def tensors(device: torch.device | str = "cpu") -> list[Tensor]:
    return [torch.randn(SHAPE, device=device) for _ in range(2)]


# Version counters


@pytest.mark.parametrize("write", WRITES)
def test_autograd_notices_what_was_overwritten(write: Write, device: torch.device) -> None:
    written = tensors(device)
    weights = torch.rand(2, 2, 16, device=device, requires_grad=True)
    out = fkv.fuse_kv(written, weights)
    write(written)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES)
def test_every_written_tensor_has_a_new_version(write: Write, mode: Callable) -> None:
    """Of it and of whatever shares its memory, in every mode, as torch's own writes."""
    bases = [torch.randn(2, *SHAPE) for _ in range(2)]
    views = [x[1] for x in bases]
    others = [x[0] for x in bases]
    before = [x._version for x in bases]
    with mode():
        write(views)
    for x, version in zip([*bases, *views, *others], 3 * before, strict=True):
        assert x._version == version + 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("view", [False, True], ids=["whole", "view"])
@pytest.mark.parametrize("write", [append, accumulate])
def test_a_compiled_write_has_a_new_version(write: Write, view: bool, backend: str) -> None:
    torch._dynamo.reset()
    bases = [torch.randn(2, *SHAPE) for _ in range(2)] if view else tensors()
    written = [x[1] for x in bases] if view else bases
    weights = torch.rand(2, 2, 16, requires_grad=True)
    out = fkv.fuse_kv(written, weights)
    before = [x.clone() for x in written]
    with torch.no_grad():
        torch.compile(write, backend=backend, fullgraph=True)(written)
    write(before)
    assert_same_bits(written, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_graph_that_reads_before_it_writes_has_the_gradient_of_what_it_read() -> None:
    torch._dynamo.reset()
    weights = torch.rand(2, 2, 16, requires_grad=True)

    def step(caches: list[Tensor]) -> Tensor:
        out = fkv.fuse_kv([x.clone() for x in caches], weights)
        with torch.no_grad():
            append(caches)
        return out

    caches = tensors()
    expected = torch.stack([x.sum((0, 1)) for x in caches])
    torch.compile(step, backend="aot_eager", fullgraph=True)(caches).sum().backward()
    torch.testing.assert_close(weights.grad, expected)


@pytest.mark.parametrize("latent", [False, True])
def test_a_cache_that_decodes_on_is_noticed(latent: bool) -> None:
    plan = fkv.CachePlan.named("vanilla", num_layers=2)
    sizes = dict(num_kv_heads=1, head_dim=16, dtype=torch.float32)
    cache = fkv.KVCache(plan, 1, 8, **sizes, rope_dim=8 if latent else None)
    cache.advance(8)
    stored = cache.values(0)
    before = stored._version
    with torch.no_grad():
        if latent:
            cache.append_latent(0, torch.ones(1, 8, 1, 24))
        else:
            cache.append(0, torch.ones(1, 8, 1, 16), torch.ones(1, 8, 1, 16))
    assert stored._version > before


def test_fusing_again_notices_an_append() -> None:
    """recompute_fusion keeps versions itself."""
    q, keys, values = torch.randn(2, 8, 4, 16, requires_grad=True), tensors(), tensors()
    weights = torch.rand(2, 2, 16)
    out = fkv.fused_kv_attn_func(q, keys, values, weights, weights, recompute_fusion=True)
    append([keys[0], values[0]])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("write", WRITES)
def test_inference_tensors_are_written_within_inference_mode_only(write: Write) -> None:
    with torch.inference_mode():
        written = tensors()
        write(written)
        before = [x.clone() for x in written]
    name = "key_cache" if write in (append, append_directly) else r"grad_sources\[0\]"
    with pytest.raises((ValueError, RuntimeError), match=f"{name} must be writable, got an inference tensor"):
        write(written)
    assert_same_bits(written, before)


# Memory


def caches_that(name: str, device: torch.device) -> tuple[list[Tensor], str]:
    """Key and value cache, and what is wrong with them, at the start of the message."""
    packed = torch.randn(2, 16, 4, 16, device=device)
    channels = packed.flatten(2)[:, :8]
    own = torch.randn(SHAPE, device=device)
    return {
        "expanded": ([own[:1].expand(SHAPE), own], "key_cache must have memory of its own for each element"),
        "expanded_heads": ([own, own[:, :, :1].expand(SHAPE)], "value_cache must have memory of its own"),
        "sliding_windows": (
            [own.flatten().as_strided(SHAPE, (16, 32, 16, 1)), own.clone()],
            "key_cache must have memory of its own",
        ),
        "one_tensor": ([own, own], "value_cache must not share memory with key_cache"),
        "same_memory": ([own, own.view(SHAPE)], "value_cache must not share memory with key_cache"),
        "shared_head": ([packed[:, :8, :2], packed[:, :8, 1:3]], "value_cache must not share memory"),
        "shared_token": ([packed[:, :8, :2], packed[:, 7:15, :2]], "value_cache must not share memory"),
        "one_shared_channel": (
            [channels[..., i : i + 32].unflatten(2, (2, 16)) for i in (0, 31)],
            "value_cache must not share memory",
        ),
    }[name]


OVERLAPS = [
    "expanded",
    "expanded_heads",
    "sliding_windows",
    "one_tensor",
    "same_memory",
    "shared_head",
    "shared_token",
    "one_shared_channel",
]


@pytest.mark.parametrize("name", OVERLAPS)
def test_caches_that_overlap_are_refused(name: str, device: torch.device) -> None:
    caches, message = caches_that(name, device)
    before = [x.clone() for x in caches]
    for call in (append, append_directly):
        with pytest.raises((ValueError, RuntimeError), match=message):
            call(caches)
    with pytest.raises(ValueError, match=message):
        append(caches)
    assert_same_bits(caches, before)


def layouts(device: torch.device) -> dict[str, list[Tensor]]:
    """Caches that share a storage, or even alternate in it, but no element."""
    B, T, G, D = SHAPE
    packed = torch.randn(B, T, 2, G, D, device=device)
    head_major = torch.randn(2, B, G, T, D, device=device)
    channels = torch.randn(B, T, G, 2 * D, device=device)
    tokens = torch.randn(B, 2 * T, G, D, device=device)
    time_major = torch.randn(T, B, 2, G, D, device=device)
    uneven = torch.randn(B, T, G, D + 24, device=device)
    odd = torch.randn(4096, device=device)
    return {
        "packed": list(packed.unbind(2)),
        "head_major": list(head_major.transpose(2, 3)),
        "heads_of_one": [packed.flatten(2, 3)[:, :, 0::2], packed.flatten(2, 3)[:, :, 1::2]],
        "halves_of_channels": [channels[..., :D], channels[..., D:]],
        "wider_values": [uneven[..., :D], uneven[..., D:]],
        "alternate_tokens": [tokens[:, 0::2], tokens[:, 1::2]],
        "time_major": [time_major[:, :, 0].transpose(0, 1), time_major[:, :, 1].transpose(0, 1)],
        "odd_strides": [
            odd.as_strided(SHAPE, (48, 112, 16, 1)),
            odd[2048:].as_strided(SHAPE, (400, 48, 16, 1)),
        ],
        "one_sequence_after_another": [torch.randn(2 * B, T, G, D, device=device)[i::2] for i in range(2)],
    }


@pytest.mark.parametrize("name", layouts(torch.device("cpu")))
def test_caches_that_share_no_element_are_written(name: str, device: torch.device) -> None:
    keys, values = layouts(device)[name]
    B, T, G, D = keys.shape
    new = torch.randn(B, 3, G, D, device=device), torch.randn(B, 3, G, values.shape[3], device=device)
    expected = keys.clone(), values.clone()
    reference.append_kvcache(*new, *expected, cache_seqlens=lengths(device))
    fkv.append_kvcache(*new, keys, values, cache_seqlens=lengths(device))
    assert_same_bits((keys, values), expected)


@pytest.mark.parametrize("argument", ["key", "value", "query", "rotary_cos", "rotary_sin", "cache_seqlens"])
def test_what_an_append_reads_is_not_what_it_writes(argument: str, device: torch.device) -> None:
    keys, values = tensors(device)
    new = torch.randn(2, 3, 2, 16, device=device)
    angles = torch.rand(8, 8, device=device)
    arguments = {"key": new, "value": new, "query": new, "cache_seqlens": lengths(device)}
    arguments |= {"rotary_cos": angles, "rotary_sin": angles}
    fkv.rope_append_kvcache(**arguments, key_cache=keys, value_cache=values)  # value is key, and sin is cos
    if argument == "cache_seqlens":
        values.view(torch.int32).flatten()[:2] = lengths(device)
        arguments[argument] = values.view(torch.int32).flatten()[:2]
    else:
        flat = values.flatten()[64:]
        arguments[argument] = flat[: arguments[argument].numel()].view(arguments[argument].shape)
    before = values.clone()
    with pytest.raises(
        ValueError, match=f"{argument} must not share memory with value_cache, which is written"
    ):
        fkv.rope_append_kvcache(**arguments, key_cache=keys, value_cache=values)
    assert_same_bits(values, before)


def test_gradient_buffers_are_apart_from_each_other_and_from_what_is_read(device: torch.device) -> None:
    sources, buffers = tensors(device), tensors(device)
    grad, weights = torch.randn(SHAPE, device=device), torch.rand(2, 2, 16, device=device)
    long = torch.randn(3, *SHAPE[1:], device=device)

    def call(buffers: list[Tensor], **options: bool) -> tuple[list[Tensor], Tensor | None]:
        return fkv.fuse_kv_backward(grad, sources, weights, grad_sources=buffers, **options)

    cases = {
        r"grad_sources\[1\] must not share memory with grad_sources\[0\]": [buffers[0], buffers[0]],
        r"grad_sources\[1\] must not share memory with grad_sources\[0\], which": [long[:2], long[1:]],
        r"grad must not share memory with grad_sources\[1\]": [buffers[0], grad],
        r"sources\[1\] must not share memory with grad_sources\[0\]": [sources[1], buffers[0]],
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            call(wrong)
    # Each element is read before it is written, or not read at all.
    expected = [x.clone() for x in sources]
    copies = [x.clone() for x in sources]
    _, of_weights = fkv.fuse_kv_backward(grad, copies, weights, grad_sources=expected)
    got, its_weights = call(sources)
    assert_same_bits((*got, its_weights), (*expected, of_weights))
    call(sources[::-1], needs_weights=False)


def test_an_expanded_gradient_buffer_is_refused(device: torch.device) -> None:
    sources, grad = tensors(device), torch.randn(SHAPE, device=device)
    buffers = [torch.zeros(1, *SHAPE[1:], device=device).expand(SHAPE), torch.zeros(SHAPE, device=device)]
    with pytest.raises(ValueError, match=r"grad_sources\[0\] must be contiguous"):
        fkv.fuse_kv_backward(grad, sources, torch.rand(2, 2, 16, device=device), grad_sources=buffers)


def test_overlaps_are_found_exactly() -> None:
    """Against all elements one by one, for strides drawn at random over one storage."""
    memory, found = torch.zeros(400), {True: 0, False: 0}
    one = torch.tensor([1, 1], dtype=torch.int32)

    def places(x: Tensor) -> list[int]:
        return torch.arange(400).as_strided(x.shape, x.stride(), x.storage_offset()).flatten().tolist()

    def draw() -> Tensor:
        sizes = (2, int(torch.randint(1, 4, ())), int(torch.randint(1, 3, ())), 8)
        strides = (*(8 * int(torch.randint(1, 7, ())) + int(torch.randint(0, 2, ())) for _ in range(3)), 1)
        return memory.as_strided(sizes, strides, int(torch.randint(0, 150, ())))

    for _ in range(600):
        keys, values = draw(), draw()
        values = values[:, : keys.shape[1]]
        keys = keys[:, : values.shape[1]]
        held = [places(keys), places(values)]
        overlap = any(len(set(x)) < len(x) for x in held) or bool(set(held[0]) & set(held[1]))
        found[overlap] += 1
        new = torch.ones(2, 1, keys.shape[2], 8), torch.ones(2, 1, values.shape[2], 8)
        try:
            fkv.append_kvcache(*new, keys, values, cache_seqlens=one)
            assert not overlap, (keys.shape, keys.stride(), values.shape, values.stride())
        except ValueError as error:
            assert overlap and "memory" in str(error), error
    assert min(found.values()) > 30, found
