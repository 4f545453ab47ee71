"""Generation and evaluation by processes that share the heads: what one process gives, out of a share of the
weights and of the cache each.

torchrun runs this very file: its last lines are what the processes do.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import HAS_GLOO, rank_main, run_ranks, torchrun
from test_distributed import processes_of
from tiny import PLANS, randomise_fusion, tiny_config
from torch import Tensor

import fusedkv_ext as fkv
from fusedkv_ext.checkpoint import pretrained
from fusedkv_ext.cli import main as cli
from fusedkv_ext.evaluation.perplexity import window_losses
from fusedkv_ext.training.data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.skipif(not HAS_GLOO, reason="needs a torch with gloo")

if HAS_GLOO:
    import torch.distributed.checkpoint as dcp

FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vanilla": ("vanilla", FOUR),
    "fusedkv": ("fusedkv", FOUR),
    "fusedkv-lite": ("fusedkv-lite", {"tie_word_embeddings": True}),
    "one KV head": ("fusedkv", {"num_key_value_heads": 1}),
    "skipv1": ("skipv1", FOUR),
    "odd vocabulary": ("fusedkv", {"vocab_size": 257}),
}
OF_A_RUN = ("fusedkv", "fusedkv-lite", "skipv1")  # saved as training saves them, too
NEW = 8
SAMPLED = {"temperature": 1.2, "top_k": 40, "top_p": 0.9}
TEXT = "".join(f"line {i} says {i * 37 % 101}\n" for i in range(60))


def build(name: str) -> fkv.Decoder:
    plan, changes = MODELS[name]
    torch.manual_seed(0)
    model = fkv.Decoder(
        tiny_config(PLANS[plan], **{"vocab_size": 256, "max_position_embeddings": 256, **changes})
    ).eval()
    with torch.no_grad():  # so that each layer and head matters to the tokens
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
    randomise_fusion(model)
    return model


def save(model: fkv.Decoder, folder: Path) -> None:
    fkv.save_pretrained(model, folder)
    ByteTokenizer().save(folder)


def save_as_a_run_does(model: fkv.Decoder, folder: Path) -> None:
    tensors = {pretrained.PREFIX + name: x for name, x in pretrained.stored_tensors(model).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(tensors, checkpoint_id=folder / pretrained.STATE, no_dist=True)
    (folder / pretrained.CONFIG).write_text(json.dumps(model.config.to_dict()))


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (length,), generator=generator) for length in (9, 3)]


def tokens(model: fkv.Decoder) -> dict[str, Tensor]:
    return {
        "greedy": model.generate(prompts(), NEW),
        "paged": model.generate(prompts(), NEW, page_size=4),
        "sampled": model.generate(prompts(), NEW, seed=3, **SAMPLED),
    }


def loss(model: fkv.Decoder) -> Tensor:
    """In float64, where rounding cannot hide a mistake."""
    ids = torch.tensor(list(TEXT.encode()[:200]))
    return window_losses(model.double(), ids, context=32).sums


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    (folder / "text.txt").write_text(TEXT)
    for name in MODELS:
        save(build(name), folder / name)
    for name in OF_A_RUN:
        save_as_a_run_does(build(name), folder / f"{name} of a run")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict]:
    return run_ranks(__file__, folder)


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_give_the_tokens_and_the_loss_of_one(name: str, ranks: list[dict]) -> None:
    model = build(name)
    alone = tokens(model)
    assert not torch.equal(alone["greedy"], alone["sampled"])
    expected = loss(model)
    for rank in ranks:
        for kind, ids in alone.items():
            assert torch.equal(rank["models"][name]["tokens"][kind], ids), kind
        torch.testing.assert_close(rank["models"][name]["loss"], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", OF_A_RUN)
def test_a_checkpoint_of_a_run_gives_the_same(name: str, ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["runs"][name].keys() == rank["models"][name]["tensors"].keys()
        for tensor, value in rank["models"][name]["tensors"].items():
            assert torch.equal(rank["runs"][name][tensor], value), tensor


@pytest.mark.parametrize("name", MODELS)
def test_each_process_reads_and_keeps_its_share(name: str, ranks: list[dict]) -> None:
    model, fewer = build(name), name == "one KV head"
    whole, shared = 0, 0
    for tensor, value in pretrained.stored_tensors(model).items():
        everywhere = bool(re.search("norm|kv_fusion|k_proj|v_proj" if fewer else "norm", tensor))
        whole, shared = whole + value.numel() * everywhere, shared + value.numel() * (not everywhere)
    spare = 32 if name == "odd vocabulary" else 0  # words of the last process
    for rank in ranks:
        found = rank["models"][name]
        assert found["read"] == found["kept"]
        assert abs(found["kept"] - whole - shared / 2) <= spare * 2
        assert found["cache"] == model.make_cache(1, 64).nbytes // (1 if fewer else 2)
    assert sum(rank["models"][name]["kept"] for rank in ranks) == 2 * whole + shared


def test_fusion_weights_stay_in_fp32(ranks: list[dict]) -> None:
    for rank in ranks:
        for tensor, dtype in rank["half"].items():
            assert dtype == (torch.float32 if "kv_fusion" in tensor else torch.bfloat16), tensor


def test_without_a_seed_all_processes_draw_the_tokens_of_the_first(ranks: list[dict]) -> None:
    assert torch.equal(ranks[0]["unseeded"], ranks[1]["unseeded"])


def test_generate_prints_on_the_first_process_only(ranks: list[dict], folder: Path) -> None:
    command = ranks[0]["commands"]["generate"]
    assert ranks[1]["commands"]["generate"] == ranks[1]["commands"]["streamed"] == ("", "")
    result = json.loads(command[0])
    alone = json.loads(said(generate(folder), cli.main)[0])
    assert {**result, "seconds": 0} == {**alone, "seconds": 0} and alone["new_tokens"] == NEW
    assert ranks[0]["commands"]["streamed"][0] == alone["prompt"] + alone["text"] + "\n"
    once, again = (json.loads(ranks[0]["commands"][name][0])["text"] for name in ("unseeded", "unseeded too"))
    assert once != again
    assert json.loads(ranks[0]["commands"]["from stdin"][0])["prompt"] == "what rank 0 reads"


def test_eval_gives_the_numbers_of_one_process(ranks: list[dict], folder: Path) -> None:
    out, err = ranks[0]["commands"]["eval"]
    assert "loss" in err and ranks[1]["commands"]["eval"] == ("", "")
    result, alone = json.loads(out), json.loads(said(evaluate(folder), cli.main)[0])
    assert alone["checkpoints"].keys() == {"vanilla", "fusedkv"}
    for name, expected in alone["checkpoints"].items():
        found = result["checkpoints"][name]
        assert found.keys() == expected.keys() >= {"parameters", "perplexity", "positions", "retrieval"}
        for number in ("loss", "perplexity"):
            assert found["perplexity"][number] == pytest.approx(expected["perplexity"][number], rel=1e-6)
    alike(result, alone)


def alike(found: Any, expected: Any) -> None:
    """The same but for the rounding of numbers."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-4)  # nats of a sum of many
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            alike(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            alike(one, other)
    else:
        assert found == expected


# What the processes do


def generate(folder: Path, *more: str) -> list[str]:
    options = ["--prompt", "line 1", "--max-new-tokens", str(NEW), "--temperature", "1.1", "--json"]
    return ["generate", str(folder / "fusedkv"), *options, *(more or ("--seed", "3"))]


def evaluate(folder: Path) -> list[str]:
    options = [
        "--context",
        "160",
        "--max-tokens",
        "640",
        "--examples",
        "1",
        "--depths",
        "50",
        "--lengths",
        "150",
        "--json",
    ]
    models = [str(folder / name) for name in ("vanilla", "fusedkv")]
    return ["eval", *models, "--text", str(folder / "text.txt"), *options]


def said(arguments: list[str], run: Any) -> tuple[str, str]:
    """What a command writes on stdout and stderr."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert run(arguments) == 0, err.getvalue()
    return out.getvalue(), err.getvalue()


def work(folder: Path) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    from fusedkv_ext.cli import eval as eval_command
    from fusedkv_ext.cli import generate as generate_command
    from fusedkv_ext.distributed import loading
    from fusedkv_ext.training import session

    tp = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {"models": {}, "runs": {}}
    read = _count_reading(loading)
    for name in MODELS:
        read.clear()
        model = loading.load_sharded(folder / name, tp)
        own = {tensor: x.to_local() for tensor, x in pretrained.stored_tensors(model).items()}
        found["models"][name] = {
            "tensors": own,
            "read": sum(read),
            "kept": sum(x.numel() for x in own.values()),
            "cache": model.make_cache(1, 64).nbytes,
            "tokens": tokens(model),
            "loss": loss(model),
        }
    for name in OF_A_RUN:
        model = loading.load_sharded(folder / f"{name} of a run", tp)
        found["runs"][name] = {tensor: x.to_local() for tensor, x in pretrained.stored_tensors(model).items()}
    half = loading.load_sharded(folder / "fusedkv", tp, torch.bfloat16)
    found["half"] = {tensor: x.dtype for tensor, x in half.named_parameters()}
    torch.manual_seed(session.rank())
    found["unseeded"] = half.generate(prompts(), NEW, temperature=1.0)

    def run(arguments: list[str]) -> int:
        """Without joining the processes, which they have done already."""
        args = cli.build_parser().parse_args(arguments)
        if args.command == "eval":
            return eval_command._run(args, speaks=session.rank() == 0)
        return generate_command._generate(args)

    sys.stdin = io.StringIO(f"what rank {session.rank()} reads")
    streamed = [part for part in generate(folder) if part != "--json"]
    found["commands"] = {
        "generate": said(generate(folder), run),
        "streamed": said(streamed, run),
        "unseeded": said(generate(folder, "--top-k", "0"), run),
        "unseeded too": said(generate(folder, "--top-k", "0"), run),
        "from stdin": said([*generate(folder), "--prompt", "-"], run),
        "eval": said(evaluate(folder), run),
    }
    return found


def _count_reading(loading: Any) -> list[int]:
    """Numbers of elements that are read from here on."""
    read: list[int] = []
    open_weights = loading.open_weights

    class Slices:
        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor

        def __getitem__(self, place: Any) -> Tensor:
            part = self.tensor[place]
            read.append(part.numel())
            return part

    class File:
        def __init__(self, file: Any) -> None:
            self.file = file

        def get_slice(self, name: str) -> Slices:
            return Slices(self.file.get_slice(name))

    @contextlib.contextmanager
    def opened(*args: Any) -> Any:
        with open_weights(*args) as file:
            yield File(file)

    loading.open_weights = opened
    return read


# torchrun -m fusedkv_ext


def test_torchrun_prints_once(folder: Path) -> None:
    done = torchrun("-m", "fusedkv_ext", *generate(folder), folder=folder)
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0, err
    alone = said(generate(folder), cli.main)[0]
    assert json.loads(out)["text"] == json.loads(alone)["text"]


def test_heads_that_do_not_divide_are_said_once(folder: Path) -> None:
    config = tiny_config(PLANS["vanilla"], vocab_size=256, num_attention_heads=3, num_key_value_heads=3)
    save(fkv.Decoder(config), folder / "three")
    done = torchrun("-m", "fusedkv_ext", "generate", folder / "three", folder=folder)
    out, err = done.communicate(timeout=60)
    assert done.returncode == 1 and not out
    (line,) = [line for line in err.splitlines() if line.startswith("fusedkv: error")]
    assert "num_attention_heads (3) must be a multiple of tp (2)" in line and "three" in line
    assert re.findall(r"exitcode +: (\S+)", err)[-1] == "2"  # of the process that torchrun saw first


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_killed_process_ends_the_other(folder: Path) -> None:
    config = tiny_config(PLANS["fusedkv"], vocab_size=256, max_position_embeddings=200000)
    save(fkv.Decoder(config), folder / "endless")
    arguments = ["generate", folder / "endless", "--max-new-tokens", "100000", "--prompt", "a"]
    run = torchrun("-m", "fusedkv_ext", *arguments, folder=folder)
    assert run.stdout is not None and run.stdout.read(3)  # they are at it
    os.kill(processes_of(run.pid)[1], signal.SIGKILL)
    started = time.monotonic()
    _, err = run.communicate(timeout=60)
    assert run.returncode == 1 and time.monotonic() - started < 30
    lines = [line for line in err.splitlines() if line.startswith("fusedkv: error")]
    assert len(lines) <= 1 and all("lost contact with the other processes" in line for line in lines), err


if __name__ == "__main__":
    rank_main(work)
