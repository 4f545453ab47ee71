"""The OpenAI server of vLLM on a tiny model, by its client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import save_byte_tokenizer
from vllm_models import TOKENS, generate, load, make_model

ROOT = Path(__file__).resolve().parents[2]
END = 256  # of a text, in the tokenizer of bytes
MAX_LEN = 256
START = 480  # seconds until a server answers, on a busy machine


class Server:
    """``python -m vllm.entrypoints.openai.api_server`` on loopback, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = (folder / "server.log").open("ab")
        options = {
            "--model": folder,
            "--served-model-name": "tiny",
            "--host": "127.0.0.1",
            "--port": self.port,
            "--dtype": "float32",
            "--max-model-len": MAX_LEN,
            "--max-num-seqs": 8,
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
        command += [str(part) for option in options.items() for part in option]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        until = time.monotonic() + START
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError((folder / "server.log").read_text()[-5000:])
            time.sleep(0.2)

    def _answers(self) -> bool:
        with suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200
        return False

    def client(self) -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=120)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        url = f"http://127.0.0.1:{self.port}/metrics"
        lines = urllib.request.urlopen(url, timeout=30).read().decode().splitlines()
        found = [line for line in lines if line.startswith((f"vllm:{name}{{", f"vllm:{name} "))]
        assert found
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def processes(self) -> list[int]:
        """Those of its session that run, by /proc."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                state, _, _, session = (path / "stat").read_text().rsplit(")", 1)[1].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append(int(path.name))
        return found

    def kill(self) -> None:
        for process in self.processes():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    make_model(folder, "llama", "fusedkv", bos_token_id=END, eos_token_id=END)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    found = Server(folder)
    yield found
    found.kill()


def prompts(count: int) -> list[list[int]]:
    """Of unequal lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, END, (5 + 7 * i % 100,), generator=generator).tolist() for i in range(count)]


def ask(client: Any, prompt: list[int], **options: Any) -> Any:
    """A greedy answer that does not end before ``max_tokens``."""
    settings = {"max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}, **options}
    settings["extra_body"] = {**settings["extra_body"], "return_token_ids": True}
    return client.completions.create(model="tiny", prompt=prompt, **settings)


def token_ids(answer: Any) -> list[int]:
    return answer.choices[0].model_extra["token_ids"]


def test_completions_are_those_of_transformers_and_streams_say_the_same(server: Server, folder: Path) -> None:
    client, inputs = server.client(), prompts(4)
    for prompt, expected in zip(inputs, generate(load(folder), inputs), strict=True):
        whole = ask(client, prompt)
        assert token_ids(whole) == expected
        parts = list(ask(client, prompt, stream=True))
        assert len(parts) > 1
        assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
        assert [token for part in parts for token in token_ids(part)] == expected


def test_32_clients_at_once_all_get_the_tokens_of_transformers(server: Server, folder: Path) -> None:
    """Of which eight run at a time."""
    client, inputs = server.client(), prompts(32)
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda x: token_ids(ask(client, x)), inputs))
    assert found == generate(load(folder), inputs)


def test_a_client_that_hangs_up_ends_its_request(server: Server) -> None:
    tokens = server.metric("generation_tokens_total")
    stream = ask(server.client(), prompts(1)[0], max_tokens=MAX_LEN - 10, stream=True)
    for _ in range(3):
        next(stream)
    assert server.metric("num_requests_running") == 1
    stream.close()
    until = time.monotonic() + 20
    while server.metric("num_requests_running") and time.monotonic() < until:
        time.sleep(0.02)
    assert server.metric("num_requests_running") == 0
    assert server.metric("kv_cache_usage_perc") == 0
    assert 3 <= server.metric("generation_tokens_total") - tokens < MAX_LEN - 10


def test_a_prompt_that_is_too_long_is_a_bad_request(server: Server) -> None:
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match=f"maximum context length is {MAX_LEN} tokens") as error:
        ask(server.client(), [5] * (MAX_LEN + 1))
    assert error.value.status_code == 400


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked for in /proc")
def test_a_server_that_is_terminated_leaves_no_process(server: Server) -> None:
    """Last, as it ends the server of the others."""
    assert len(server.processes()) >= 2  # the server and its engine
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(timeout=30)
    until = time.monotonic() + 10
    while server.processes() and time.monotonic() < until:
        time.sleep(0.05)
    assert not server.processes()
