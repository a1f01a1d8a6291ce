"""Grade with a judge: a model behind an OpenAI-compatible endpoint that the user has named.

Replies are kept in a folder, one file for each hash of (endpoint, request), so that an evaluation that was interrupted asks the
judge only for what is missing.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moe_train import config
from moe_train.data.records.normal_form import joined_texts
from moe_train.evaluate.suites.items import SuiteItem
from moe_train.evaluate.suites.not_graded import NotGraded
from moe_train.machine.files import JsonObject, read_object, write_text

log = logging.getLogger(__name__)
ATTEMPTS = 3
"""Number of times that a request is made before the endpoint counts as down."""
WAIT_SECONDS = 2.0
"""Seconds before the second attempt; twice as many before each further one."""
TIMEOUT_SECONDS = 120.0
"""Longest wait for a reply."""


class Endpoint(NamedTuple):
    """Endpoint of a judge."""

    url: str
    """Such as `http://localhost:8000/v1`."""
    cache: Path
    """Folder of the replies so far."""


def default_cache() -> Path:
    """Return the folder of replies if none is named: `moe_train/judge` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_train" / "judge"


def judge_grade(grader: config.JudgeGrader, endpoint: Endpoint | None, suite: str) -> Callable[[SuiteItem, str], float]:
    """Return the function that asks the judge; no connection is made before it is called.

    Args:
        grader: The suite's section.
        endpoint: The endpoint that the user has named; None if none was named.
        suite: The suite's name, for messages.

    Raises:
        ValueError: No endpoint was named, its address is none, or the variable that should hold its key is not set.
    """
    if endpoint is None:
        raise ValueError(
            f"suite {suite} sends its questions and the answers to a judge, {grader.model}; name its endpoint with --judge URL to "
            "allow that"
        )
    address = urllib.parse.urlsplit(endpoint.url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(f"--judge {endpoint.url} is no address; write it as http://HOST:PORT/v1")
    if address.username is not None:
        # It would be written into the folder of replies.
        raise ValueError("--judge has a name or a password in its address; remove it, and state api_key_variable in the suite")
    headers = {"Content-Type": "application/json"}
    if grader.api_key_variable is not None:
        key = os.environ.get(grader.api_key_variable)
        if not key:
            raise ValueError(
                f"suite {suite}: the environment variable {grader.api_key_variable} is not set; put the judge's key there"
            )
        headers["Authorization"] = f"Bearer {key}"
    log.info(
        "suite %s: questions and answers are sent to the judge %s at %s", suite, grader.model, address.netloc.rpartition("@")[2]
    )

    def grade(item: SuiteItem, answer: str) -> float:
        reply = _reply(endpoint, headers, _request(grader, item, answer), item.location)
        verdict = _verdict(reply, grader)
        if verdict is None:
            raise NotGraded(f"the judge replied {reply[-80:]!r}, which is none of {', '.join(grader.verdicts)}")
        return grader.verdicts[verdict]

    return grade


def _request(grader: config.JudgeGrader, item: SuiteItem, answer: str) -> JsonObject:
    """Return the body of the request for one answer."""
    question = "\n\n".join(f"{joined_texts(message) or ''}" for message in item.messages)
    texts = {
        "question": question,
        "answer": answer,
        "expected": " or ".join(item.answers),
        "guidance": item.guidance or "",
    }
    # In one pass, so that a name in braces in an item's text is not replaced in turn.
    content = re.sub(r"\{(question|answer|expected|guidance)\}", lambda match: texts[match[1]], grader.instructions)
    return {
        "model": grader.model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": grader.max_tokens,
    }


def _reply(endpoint: Endpoint, headers: dict[str, str], body: JsonObject, location: str) -> str:
    """Return the judge's reply, from the folder of replies if it has it.

    Raises:
        ConnectionError: The endpoint does not answer.
        RuntimeError: It refuses the request, or its answer is not that of such an endpoint.
    """
    text = json.dumps({"endpoint": endpoint.url, "request": body}, sort_keys=True, ensure_ascii=False)
    file = endpoint.cache / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    if file.exists():
        return str(read_object(file)["reply"])
    url = f"{endpoint.url.rstrip('/')}/chat/completions"
    answered = _post(url, headers, body, location)
    try:
        reply = answered["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        reply = None
    if not isinstance(reply, str):
        raise RuntimeError(f"{location}: {url} answered {json.dumps(answered)[:120]}, which has no text; is it such an endpoint?")
    endpoint.cache.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({"endpoint": endpoint.url, "request": body, "reply": reply}, ensure_ascii=False) + "\n")
    return reply


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follow no redirect, which would send the key to a host that was not named."""

    def redirect_request(self, *_: Any) -> None:
        """Return no request, so that the redirect is raised as an error."""


_OPENER = urllib.request.build_opener(_NoRedirects)


def _post(url: str, headers: dict[str, str], body: JsonObject, location: str) -> Any:
    """Send a request and return the parsed answer; try again where that may help."""
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            with _OPENER.open(request, timeout=TIMEOUT_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(300).decode(errors="replace").split())
            reason = f"{error.code} {error.reason} {said}".strip()
            # Too many requests, and errors of the server, may pass.
            if error.code != 429 and error.code < 500:
                raise RuntimeError(
                    f"{location}: the judge at {url} refused the request: {reason}; correct --judge or the suite"
                ) from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except ValueError as error:
            raise RuntimeError(f"{location}: {url} did not answer with JSON ({error}); is it such an endpoint?") from error
    raise ConnectionError(
        f"{location}: the judge at {url} does not answer ({reason}); its replies so far are kept, so the same command continues"
    )


def _verdict(reply: str, grader: config.JudgeGrader) -> str | None:
    """Return the verdict that stands last in a reply as a word of its own; None if there is none."""
    last: tuple[int, str] | None = None
    for verdict in grader.verdicts:
        for match in re.finditer(rf"(?<!\w){re.escape(verdict)}(?!\w)", reply, re.IGNORECASE):
            # Of two verdicts that end together, the longer one is meant: "not correct" rather than "correct".
            if last is None or (match.end(), len(verdict)) > (last[0], len(last[1])):
                last = match.end(), verdict
    return None if last is None else last[1]
