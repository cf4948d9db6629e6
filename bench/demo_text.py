"""The text of the shipped demo model: four domains read from three pinned wheels.

Two domains are near each other (Python sources and English docstrings) and two are far from
everything else, because they use another script: translations into Cyrillic and into Arabic
script. A mixture-of-experts model gives such domains experts of their own, which is what the
compression methods have to notice.

A domain is a list of documents. Those whose hash comes first are held out, up to 2 KB of each,
until there are 20 KB; the model is trained on the others. No document is split between the two.
"""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The hash pins the file, so the text is the same wherever it is downloaded from.
WHEELS = {
    "sympy==1.14.0": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
    "scipy==1.17.1": "43af8d1f3bea642559019edfe64e9b11192a8978efbd1539d7bc2aaa23d92de4",
    "Django==5.2.8": "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
}
CYRILLIC = ("ru", "be", "uk", "sr", "bg", "mn", "ky", "mk", "tg", "os", "kk", "tt", "udm")
ARABIC = ("ar", "ug", "ckb", "fa", "ur", "ar_DZ")

HELD_OUT = 20_000
PASSAGE = 2_000


class Domain(NamedTuple):
    """One kind of text, as UTF-8 bytes."""

    train: bytes
    held_out: bytes


def domains(wheels: Path) -> dict[str, Domain]:
    """Read the four domains from the wheels, which are downloaded into `wheels` if missing."""
    sympy, scipy, django = (zipfile.ZipFile(path) for path in download(wheels))
    return {
        "code": split(sources(sympy)),
        "docs": split(docstrings(scipy)),
        "cyrillic": split(translations(django, CYRILLIC)),
        "arabic": split(translations(django, ARABIC)),
    }


def download(folder: Path) -> list[Path]:
    """Fetch the pinned wheels with pip, which checks their hashes, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    found = by_hash(folder)
    if found.keys() >= set(WHEELS.values()):
        return [found[digest] for digest in WHEELS.values()]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        for pin, digest in WHEELS.items():
            requirements.write(f"{pin} --hash=sha256:{digest}\n")
        requirements.flush()
        # One platform for everybody: the text inside is the same, the hash of the wheel is not.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        pip += ["--only-binary=:all:", "--python-version=3.11", "--implementation=cp"]
        pip += ["--platform=manylinux_2_28_x86_64", "--platform=manylinux_2_27_x86_64"]
        pip += ["--require-hashes", f"--requirement={requirements.name}", f"--dest={folder}"]
        subprocess.run(pip, check=True)
    found = by_hash(folder)
    return [found[digest] for digest in WHEELS.values()]


def by_hash(folder: Path) -> dict[str, Path]:
    """Return the wheels of a folder by the SHA-256 of their bytes."""
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in folder.glob("*.whl")}


def sources(wheel: zipfile.ZipFile) -> list[str]:
    """Every module of the package, without its tests."""
    names = sorted(name for name in wheel.namelist() if name.endswith(".py"))
    return [wheel.read(name).decode() for name in names if "/tests/" not in name]


def docstrings(wheel: zipfile.ZipFile) -> list[str]:
    """Return the long docstrings of modules, classes and functions, each once."""
    found: dict[str, None] = {}
    for source in sources(wheel):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 300:
                    found[text] = None
    return list(found)


def translations(wheel: zipfile.ZipFile, languages: tuple[str, ...]) -> list[str]:
    """Return runs of consecutive translated messages of about a passage, each message once."""
    seen: set[str] = set()
    documents = []
    for name in sorted(wheel.namelist()):
        if not name.endswith(tuple(f"/locale/{lang}/LC_MESSAGES/django.po" for lang in languages)):
            continue
        run: list[str] = []
        for message in translated(wheel.read(name).decode()):
            if message.isascii() or message in seen:
                continue
            seen.add(message)
            run.append(message)
            if sum(len(text.encode()) for text in run) > PASSAGE:
                documents.append("\n".join(run))
                run = []
        documents.append("\n".join(run))
    return [text for text in documents if text]


def translated(catalogue: str) -> Iterator[str]:
    """Yield the `msgstr` texts of a gettext catalogue, without its header."""
    for entry in catalogue.split("\n\n")[1:]:
        message: list[str] = []
        for line in entry.splitlines():
            keyword, _, rest = line.partition(" ")
            if keyword.startswith(("#", "msg")):
                if message:
                    yield "".join(message)
                message = [ast.literal_eval(rest)] if keyword.startswith("msgstr") else []
            elif line.startswith('"') and message:
                message.append(ast.literal_eval(line))
        if message:
            yield "".join(message)


def split(documents: list[str]) -> Domain:
    """Hold out the documents whose hash comes first; keep the others, in order of hash."""
    order = sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())
    held_out = b""
    while len(held_out) < HELD_OUT:
        passage = order.pop(0).encode()[:PASSAGE]
        held_out += passage[: passage.rfind(b"\n") + 1]
    held_out = held_out[: held_out.rfind(b"\n", 0, HELD_OUT) + 1]
    return Domain("\n\n".join(order).encode(), held_out)
