"""Gather real text that every machine has: the Python standard library's reference text, docstrings and sources.

Everything is read with `ast`; no module is imported. What is gathered is under Python's licence (PSF).
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
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "encodings"}
_TOPICS = Path("pydoc_data", "topics.py")


class _Docstring(NamedTuple):
    name: str  # such as json.dumps
    kind: str  # module, class or function
    text: str


def gather(
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
    paths = [path for path in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(path.relative_to(root).parts)]
    if root / _TOPICS not in paths or len(paths) < 100:
        raise FileNotFoundError(
            f"{root} does not hold the standard library's sources ({len(paths)} .py files, pydoc_data "
            f"{'present' if root / _TOPICS in paths else 'missing'}); use a full Python"
        )
    text: dict[str, str] = {f"topic {name}": topic for name, topic in _topics(root / _TOPICS)}
    chat: dict[str, list[tuple[str, str]]] = {}
    sources: dict[str, str] = {}
    answers: set[str] = set()
    for path in paths:
        relative = path.relative_to(root)
        if relative == _TOPICS:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue  # a few files of the library are invalid on purpose
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        docstrings = [doc for doc in _docstrings(tree, module) if doc.text not in answers]
        answers.update(doc.text for doc in docstrings)
        if docstrings:
            text[f"module {module}"] = "\n\n".join(f"{doc.name}\n\n{doc.text}" for doc in docstrings)
        chat[f"module {module}"] = list(_questions(docstrings))
        if source.strip():
            sources[f"module {module}"] = source
    records = _limit_bytes([*text.items(), *sorted(sources.items(), key=lambda item: _digest(item[0]))], max_bytes)

    lines: dict[str, list[dict]] = {name: [] for name in FILES}
    for name, body in records:
        lines[f"text_{_split_of(name, heldout)}.jsonl"].append({"text": body})
    for name, pairs in chat.items():
        for question, answer in pairs:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines[f"chat_{_split_of(name, heldout)}.jsonl"].append({"messages": messages})
    with new_directory(out_dir) as directory:
        for name, rows in lines.items():
            rows.sort(key=lambda row: _digest(json.dumps(row)))  # mixes the kinds of records throughout each file
            with (directory / name).open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return {name: len(rows) for name, rows in lines.items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _split_of(name: str, heldout: float) -> str:
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
            topics = sorted(ast.literal_eval(node.value).items(), reverse=True)
            by_text = {text: name for name, text in topics}
            return sorted((name, text) for text, name in by_text.items())
    raise ValueError(f"{path} does not define topics; Python {sys.version.split()[0]} keeps its reference text elsewhere")


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
