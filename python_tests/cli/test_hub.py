"""Models of the Hugging Face Hub by their ids, from a stand-in for the Hub on this machine."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

from fusedkv_ext.cli.hub import local_folder
from fusedkv_ext.cli.main import main

constants = pytest.importorskip("huggingface_hub.constants")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "ORG/safe": {"config.json": b"{}", "model.safetensors": b"weights", "pytorch_model.bin": b"old"},
    "ORG/old": {"config.json": b"{}", "pytorch_model.bin": b"old", "flax_model.msgpack": b"other"},
}


class Hub(BaseHTTPRequestHandler):
    """What `snapshot_download` asks for: the files of a commit, then each of them."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(path)
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            return self.listing("/".join(parts[2:4]), parts[4:], body)
        name, content = "/".join(parts[:2]), None
        if len(parts) > 4 and parts[2] == "resolve":
            content = FILES.get(name, {}).get("/".join(parts[4:]))
        if content is None:
            return self.send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.send(200, content, body, etag)

    def listing(self, name: str, rest: list[str], body: bool) -> None:
        if name == "ORG/gated":
            return self.send(403, b"", body, {"X-Error-Code": "GatedRepo"})
        if name not in FILES:
            return self.send(404, b"", body, {"X-Error-Code": "RepoNotFound"})
        if rest[:1] == ["revision"] and rest[1] not in ("main", "v1", COMMIT):
            return self.send(404, b"", body, {"X-Error-Code": "RevisionNotFound"})
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in FILES[name].items()
            ]
            return self.send(200, json.dumps(tree).encode(), body)
        siblings = [{"rfilename": file} for file in FILES[name]]
        info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}
        return self.send(200, json.dumps(info).encode(), body)

    def send(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        kind = "application/json" if self.path.startswith("/api") else "application/octet-stream"
        for key, value in {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The stand-in, an empty cache, and no such folder here; the paths that are asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield server.asked
    server.shutdown()
    server.server_close()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_id_is_downloaded_once(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_folder("ORG/safe")
    assert names(folder) == {"config.json", "model.safetensors"}, "one format of weights is enough"
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert local_folder("ORG/safe@v1") == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.clear()
    assert local_folder(Path("ORG/safe")) == folder and not hub


def test_weights_of_the_older_format_are_taken_where_there_are_no_others(hub: list[str]) -> None:
    assert names(local_folder("ORG/old")) == {"config.json", "pytorch_model.bin"}


def test_paths_are_left_alone(hub: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    for name in ("runs/one", "runs/two", "name", "/no/where", "a/b/c", "./a/b", "../a"):
        assert local_folder(name) == Path(name)
    assert not hub


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ORG/none", "ORG/none is not a local folder, and the Hugging Face Hub has no such model"),
        ("ORG/safe@v2", "has no revision 'v2' of it"),
        ("ORG/gated", "requires that you accept its terms"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_error(name: str, message: str, hub: list[str]) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        local_folder(name)


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_the_error_says_what_to_do(
    offline: bool, hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(
        FileNotFoundError, match="cannot be reached: .* run `hf download ORG/safe --local-dir DIR`"
    ):
        local_folder("ORG/safe")


@pytest.mark.parametrize("command", ["generate", "eval", "convert", "uptrain"])
def test_commands_take_ids(command: str, hub: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """All of them download before they look at what is in the folder."""
    more = {"convert": ["--plan", "yoco", "--out", "out"], "uptrain": ["--out", "out", "--steps", "1"]}
    assert main([command, "ORG/none", *more.get(command, [])]) == 1
    assert "the Hugging Face Hub has no such model" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ImportError, match=r"downloading it from the Hugging Face Hub needs .*fusedkv_ext\[hf\]"
    ):
        local_folder("ORG/safe")
