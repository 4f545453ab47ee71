"""Hooks of mkdocs (mkdocs.yml): the documents of the repository as pages of the site.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages. Documents link to each other and to files of the
repository by relative paths, so that links work in a checkout. Here they are rewritten. A file outside docs/
that a document links to is copied to the site. A link to a folder becomes its text. A link to nothing is a
warning, which strict mode turns into an error.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
COPIES = "repository"  # folder of the site for files outside docs/

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_MARK = re.compile(r"^<!-- (?:generated: .*|end) -->$", re.MULTILINE)
_log = logging.getLogger("mkdocs.plugins.site_hooks")


def _source(uri: str) -> Path:
    """The file of the repository that a page is made from."""
    names = {page: name for name, page in PAGES.items()}
    return ROOT / names[uri] if uri in names else ROOT / "docs" / uri


def _target(source: Path, link: str) -> Path | None:
    """The file or folder of the repository that a link leads to; None for an address."""
    return None if "://" in link else Path(os.path.normpath(source.parent / link))


def _uri(target: Path) -> str:
    """Where a file of the repository is on the site."""
    name = target.relative_to(ROOT).as_posix()
    return PAGES.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else f"{COPIES}/{name}")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages outside docs/, and the files that documents link to."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        source = _source(page.src_uri)
        for _, _, link, _ in _LINK.findall(source.read_text(encoding="utf-8")):
            target = _target(source, link)
            if target and target.is_file() and files.get_file_from_path(_uri(target)) is None:
                files.append(File.generated(config, _uri(target), abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrites the links of a page, and removes the marks of generated blocks."""
    source = _source(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        image, text, link, anchor = match.groups()
        target = _target(source, link)
        if target is None:
            return match[0]
        if target.is_dir():
            return text
        if not target.exists():
            _log.warning("%s links to %s, which does not exist", source.relative_to(ROOT), link)
        relative = os.path.relpath(_uri(target), Path(page.file.src_uri).parent).replace(os.sep, "/")
        return f"{image}[{text}]({relative}{anchor or ''})"

    return _LINK.sub(rewritten, _MARK.sub("\n", markdown))
