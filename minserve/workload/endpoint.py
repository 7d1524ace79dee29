"""`Endpoint`: an OpenAI-compatible server, the name of its model, and the fields that it knows."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from minserve.errors import WorkloadError
from minserve.slo.objectives import Targets, Task
from minserve.workload.task_terms import task_field

KEY_VARIABLES = ("MINSERVE_API_KEY", "OPENAI_API_KEY")
# Servers drop idle connections after 5 s or more; a request must not use a dying connection.
KEEPALIVE_S = 2.0
# Time limit of the first questions to a server, not of requests.
ANSWER_S = 30.0
# Files that are open beside one socket per request: log files, pipes, libraries.
SPARE_FILES = 64
# HTTP statuses with which a server answers a field that it does not know.
REFUSALS = (400, 422)
# Fields beyond OpenAI's API that a load test sends: every output has exactly the wanted length,
# and a token without a text is counted when it comes, not with a later token's text.
EXTRAS = {"ignore_eos": True, "skip_special_tokens": False}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of a server, and the form of requests to it.

    Attributes:
        url: URL of the server, without ``/v1``.
        model: the model's name in requests.
        chat: use ``/v1/chat/completions``.
        takes_slo: the server is a minserve, which reads the field ``slo``.
        takes_thinking: the server is a minserve whose model marks the end of its thinking.
        takes_extras: the server reads the fields that vLLM and minserve add to OpenAI's API.
        max_model_len: largest sum of prompt and output tokens; ``None`` if unknown.
    """

    url: str
    model: str
    chat: bool = False
    takes_slo: bool = False
    takes_thinking: bool = False
    takes_extras: bool = True
    max_model_len: int | None = None

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, said: Sequence[str], num_tokens: int, slo: Any = None) -> dict[str, Any]:
        """Return the body of a streaming request for an output of exactly ``num_tokens`` tokens.

        Args:
            said: texts of the user and the model in turn, the user's first and last.
            slo: value of the field ``slo`` for a minserve, if any.
        """
        roles = ("user", "assistant")
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": num_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.chat:
            body["messages"] = [
                {"role": roles[i % 2], "content": text} for i, text in enumerate(said)
            ]
        else:
            body["prompt"] = "".join(said)
        if self.takes_extras:
            body |= EXTRAS
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        if slo is not None and self.takes_slo:
            body["slo"] = slo
        return body

    def slo_field(self, targets: Targets, task: Task | None = None) -> dict[str, Any] | None:
        """Return targets as a minserve reads them: the same times by which the client judges.

        A task stands for them, as the server divides its time.

        If the model marks no end of its thinking, the strictest pace holds for the whole output.
        """
        if task is not None:
            return task_field(task)
        paces = [stage.tpot_s for stage in targets.stages]
        if len(paces) > 1 and not self.takes_thinking:
            paces = [min(paces)]
        named = {"ttft_ms": targets.ttft_s, "tpot_ms": paces[-1]}
        if len(paces) > 1:
            named["thinking_tpot_ms"] = paces[0]
        named["finish_ms"] = targets.finish_s
        return {k: v * 1e3 for k, v in named.items() if math.isfinite(v)} or None


def open_session(url: str) -> aiohttp.ClientSession:
    """Return a session without limits on connections or time, with the key of the environment."""
    key = next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None),
        headers={} if key is None else {"Authorization": f"Bearer {key}"},
    )


async def find_endpoint(url: str, model: str | None = None, *, chat: bool = False) -> Endpoint:
    """Ask a server for its models and for the fields that it knows.

    Args:
        url: with or without ``/v1``.
        model: the model's name in requests; default: the first name that the server lists.

    Raises:
        WorkloadError: if no server answers there, or if it cannot be used.
    """
    url = _base_url(url)
    try:
        async with open_session(url) as session:
            listed = await _list_models(session, url)
            if model is None:
                model = _first_name(listed, url)
            card = next((one for one in listed if one.get("id") == model), {})
            endpoint = Endpoint(
                url,
                model,
                chat=chat,
                takes_slo=card.get("owned_by") == "minserve",
                max_model_len=card.get("max_model_len"),
            )
            return await _probe(session, endpoint)
    except (aiohttp.ClientError, OSError) as error:
        raise WorkloadError(f"no server answers at {url}: {error or repr(error)}") from None


def raise_file_limit(wanted: int) -> None:
    """Raise this process's limit of open files to what ``wanted`` streams need, if allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted + SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def too_few_files() -> WorkloadError:
    """Return the error for a stream that could not be opened."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return WorkloadError(
        f"this process may open {limit} files at once, too few for so many streams; "
        f"raise the limit (ulimit -n) or lower the rate"
    )


def _base_url(url: str) -> str:
    if "://" not in url:
        url = f"http://{url}"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise WorkloadError(f"{url} is not the address of a server, such as http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1")


async def _list_models(session: aiohttp.ClientSession, url: str) -> list[dict[str, Any]]:
    limit = aiohttp.ClientTimeout(total=ANSWER_S)
    try:
        async with session.get("/v1/models", timeout=limit) as response:
            if response.status in (401, 403):
                raise WorkloadError(
                    f"the server at {url} wants a key; set {' or '.join(KEY_VARIABLES)}"
                )
            if response.status == 503:
                raise WorkloadError(f"the server at {url} is not ready yet: it answers 503")
            listed = (await response.json(content_type=None))["data"]
            if response.status == 200 and all(isinstance(one, dict) for one in listed):
                return listed
    except TimeoutError:
        raise WorkloadError(f"no answer from {url} within {ANSWER_S:g} s") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise WorkloadError(f"the server at {url} lists no models under /v1/models")


def _first_name(listed: list[dict[str, Any]], url: str) -> str:
    names = [one["id"] for one in listed if "id" in one]
    if not names:
        raise WorkloadError(f"the server at {url} lists no models; give a name with --model")
    return names[0]


async def _probe(session: aiohttp.ClientSession, endpoint: Endpoint) -> Endpoint:
    """Ask for one token, with fewer and fewer of the fields that not all servers know.

    Returns:
        the endpoint, with the fields noted that the server takes.

    Raises:
        WorkloadError: if the server refuses the plainest request too.
    """
    if endpoint.takes_slo:
        staged = {"tpot_ms": 1e6, "thinking_tpot_ms": 1e6}
        status, _ = await _one_token(session, endpoint, staged)
        endpoint = replace(endpoint, takes_thinking=status not in REFUSALS)
    status, said = await _one_token(session, endpoint)
    if status in REFUSALS:
        endpoint = replace(endpoint, takes_extras=False)
        status, said = await _one_token(session, endpoint)
    if 400 <= status < 500 and status != 429:
        raise WorkloadError(f"the server at {endpoint.url} refuses a request: {status}: {said}")
    return endpoint


async def _one_token(
    session: aiohttp.ClientSession, endpoint: Endpoint, slo: Any = None
) -> tuple[int, str]:
    body = endpoint.body(["Hello"], 1, slo)
    async with session.post(endpoint.path, json=body) as response:
        return response.status, (await response.text())[:300]
