"""Gather real text that every machine has: reference text, docstrings and sources of the Python standard library.

Files are parsed with `ast`; no module is imported. The text is under Python's licence (PSF).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moe_train.machine.files import new_directory, refuse_existing

FILES = ("text_train.jsonl", "text_heldout.jsonl", "chat_train.jsonl", "chat_heldout.jsonl")
# Not useful as text: tests, third-party packages, character tables.
_EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "encodings"}
_TOPICS = Path("pydoc_data", "topics.py")


class _Docstring(NamedTuple):
    name: str  # such as json.dumps
    kind: str  # module, class or function
    text: str


def gather_texts(
    out_dir: str | Path, *, max_bytes: int = 8_000_000, heldout: float = 0.05, stdlib: str | Path | None = None
) -> dict[str, int]:
    """Write `FILES` into the new directory `out_dir` and return the number of records of each.

    The text files have {"text": …} records: reference topics, each module's docstrings, and as many module sources as
    `max_bytes` of text leave room for. The chat files have {"messages": …} records: "What does json.dumps do?" and the first
    paragraph of its docstring. A module or topic is held out, with everything that comes from it, by a hash of its name. Text
    that appears in two modules is taken once. The same Python gives the same files.

    Args:
        out_dir: the folder to write.
        max_bytes: limit for the text of the text files.
        heldout: approximate share of modules and topics that are held out.
        stdlib: folder of the standard library; None for that of this Python.

    Raises:
        FileNotFoundError: this Python comes without its sources.
        FileExistsError: `out_dir` exists and is not an empty folder.
    """
    refuse_existing(Path(out_dir))
    root = Path(stdlib or sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py")) if not _EXCLUDED & set(path.relative_to(root).parts)]
    if root / _TOPICS not in paths or len(paths) < 100:
        pydoc_data = "present" if root / _TOPICS in paths else "missing"
        raise FileNotFoundError(
            f"{root} does not contain the standard library's sources ({len(paths)} .py files, pydoc_data {pydoc_data}); "
            "use a Python installation that includes them"
        )
    library = _read_library(root, [path for path in paths if path != root / _TOPICS])
    text = {f"topic {name}": topic for name, topic in _topics(root / _TOPICS)}
    text |= library.docstrings
    # In the order of hashes, so that the sources within `max_bytes` are a mixture, and not those at the start of the alphabet.
    by_digest = sorted(library.sources.items(), key=lambda item: _digest(item[0]))
    lines: dict[str, list[_Record]] = {name: [] for name in FILES}
    for name, body in _limit_bytes([*text.items(), *by_digest], max_bytes):
        lines[f"text_{_split_of(name, heldout)}.jsonl"].append({"text": body})
    for name, pairs in library.questions.items():
        for question, answer in pairs:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines[f"chat_{_split_of(name, heldout)}.jsonl"].append({"messages": messages})
    with new_directory(out_dir) as directory:
        for name, rows in lines.items():
            rows.sort(key=lambda row: _digest(json.dumps(row)))  # mixes the kinds of records throughout each file
            with (directory / name).open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return {name: len(rows) for name, rows in lines.items()}


_Record = dict[str, str | list[dict[str, str]]]


class _Library(NamedTuple):
    """The texts of the standard library's modules, each by `module NAME`."""

    docstrings: dict[str, str]
    """All docstrings of a module, joined; absent for a module without any."""
    questions: dict[str, list[tuple[str, str]]]
    """Questions and answers made from the docstrings."""
    sources: dict[str, str]


def _read_library(root: Path, paths: list[Path]) -> _Library:
    """Read the modules of the standard library."""
    library = _Library({}, {}, {})
    seen: set[str] = set()
    for path in paths:
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue  # a few files of the library are invalid on purpose
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        docstrings = [doc for doc in _docstrings(tree, module) if doc.text not in seen]
        seen.update(doc.text for doc in docstrings)
        if docstrings:
            library.docstrings[f"module {module}"] = "\n\n".join(f"{doc.name}\n\n{doc.text}" for doc in docstrings)
        library.questions[f"module {module}"] = list(_questions(docstrings))
        if source.strip():
            library.sources[f"module {module}"] = source
    return library


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _split_of(name: str, heldout: float) -> str:
    # Eight hex digits are a uniform number below 2**32. By name, so that all texts of a module are in the same part.
    return "heldout" if int(_digest(name)[:8], 16) < heldout * 2**32 else "train"


def _limit_bytes(records: list[tuple[str, str]], max_bytes: int) -> Iterator[tuple[str, str]]:
    for name, body in records:
        max_bytes -= len(body.encode("utf-8", "surrogatepass"))
        if max_bytes < 0:
            return
        yield name, body


def _topics(path: Path) -> list[tuple[str, str]]:
    """Read the dict `topics` of pydoc_data/topics.py as (name, reference text), each text once, under its first name."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "topics" for t in node.targets):
            # Reversed, so that the first name of a text is the last one that the dict below keeps.
            topics = sorted(ast.literal_eval(node.value).items(), reverse=True)
            by_text = {text: name for name, text in topics}
            return sorted((name, text) for text, name in by_text.items())
    raise ValueError(f"{path} does not define topics; use another version of Python than {sys.version.split()[0]}")


def _docstrings(tree: ast.Module, module: str) -> Iterator[_Docstring]:
    """Yield the docstrings of the module and of its public classes, methods and functions, in source order."""

    def walk(node: ast.AST, name: str, kind: str) -> Iterator[_Docstring]:
        text = ast.get_docstring(node, clean=True) if isinstance(node, _DOCUMENTED) else None
        if text and text.strip():
            yield _Docstring(name, kind, inspect.cleandoc(text))
        for child in getattr(node, "body", []):
            if isinstance(child, _DOCUMENTED) and not child.name.startswith("_"):  # type: ignore[union-attr]
                child_kind = "class" if isinstance(child, ast.ClassDef) else "function"
                yield from walk(child, f"{name}.{child.name}", child_kind)  # type: ignore[union-attr]

    return walk(tree, module, "module")


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_QUESTION = {"module": "What is the module {} for?", "class": "What is {}?", "function": "What does {} do?"}


def _questions(docstrings: list[_Docstring]) -> Iterator[tuple[str, str]]:
    """Yield a question per documented name with its answer, the docstring's first paragraph joined into one line."""
    for doc in {doc.name: doc for doc in docstrings}.values():  # a property and its setter share a name
        answer = " ".join(doc.text.split("\n\n")[0].split())
        if 20 <= len(answer) <= 400:
            yield _QUESTION[doc.kind].format(doc.name), answer
