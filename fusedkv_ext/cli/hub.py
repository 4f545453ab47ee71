"""Models named by their id on the Hugging Face Hub, such as ``Qwen/Qwen3-0.6B`` or ``ORG/NAME@REVISION``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fusedkv_ext.extras import need

__all__ = ["local_folder"]

_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHTS = ("*.safetensors", "*.bin")  # the second only if there are none of the first


def local_folder(name: str | os.PathLike[str]) -> Path:
    """The folder of a model: a local path unchanged, or the download folder of a Hub id.

    A name is an id if it is ORG/NAME or ORG/NAME@REVISION, and neither it nor ORG is a path here. Downloads
    go to the cache of ``huggingface_hub`` (HF_HOME), and a model that is there already is not loaded again.

    Args:
        name: A path or an id.

    Raises:
        FileNotFoundError: The Hub has no such model, it is gated, or there is no network and no copy here.
        MissingExtra: The name is an id, and ``huggingface_hub`` is not installed.
    """
    path, match = Path(name), _ID.fullmatch(str(name))
    if match is None or path.exists() or path.parent.exists():
        return path
    need("huggingface_hub", f"{name} is no folder here; downloading it from the Hugging Face Hub", "hf")
    folder = _snapshot(match["repo"], match["revision"], (*_SMALL_FILES, _WEIGHTS[0]))
    if not any(folder.glob(_WEIGHTS[0])):
        folder = _snapshot(match["repo"], match["revision"], (*_SMALL_FILES, _WEIGHTS[1]))
    return folder


def _snapshot(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    prefix = f"{repo} is not a local folder, and the Hugging Face Hub"
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except hub.GatedRepoError as error:
        raise FileNotFoundError(
            f"{prefix} requires that you accept its terms; do so on its page, then run `hf auth login`"
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{prefix} has no such model, or it is private; check the name, or run `hf auth login`"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{prefix} has no revision {revision!r} of it; name another one") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{prefix} cannot be reached: there is no network or HF_HUB_OFFLINE is set, and the local cache "
            f"has no copy; run `hf download {repo} --local-dir DIR` on a machine with network, copy DIR here "
            "and name it"
        ) from error
    except (hub.HfHubHTTPError, hub.HFValidationError) as error:
        raise FileNotFoundError(f"{prefix} reports: {str(error).strip().splitlines()[0]}") from error
