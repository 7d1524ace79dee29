"""Models of the Hugging Face hub: downloading them, and the folders of its cache on this disk.

The cache keeps each repository in ``models--org--name``: ``refs/main`` holds the commit that the
branch had when it was last asked for, and ``snapshots/<commit>`` links to the files of a commit.
Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import glob
import os
import re
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from minserve.errors import ModelLoadError
from minserve.models.finding.files import first_line, folder_names, kind_of, listed
from minserve.progress_bar import LogProgress, is_terminal

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# Files of a repository that are fetched beside its weights: in its first folder, and templates.
_BESIDE_WEIGHTS = re.compile(
    r"[^/]*\.(json|model|txt|jinja)|additional_chat_templates/[^/]*\.jinja", re.ASCII
)
# Seconds in which the hub has to answer; then the cache is looked at.
ANSWER_S = 1.8
_CACHE_PREFIX, _SNAPSHOTS = "models--", "snapshots"

_T = TypeVar("_T")


def repo_of_cache_folder(folder: Path) -> str | None:
    """Return ``org/name`` (or ``name``) of a folder ``models--org--name``; else ``None``."""
    name = folder.name
    if not name.startswith(_CACHE_PREFIX):
        return None
    return "/".join(name.removeprefix(_CACHE_PREFIX).split("--", 1))


def find_cached(folder: Path) -> tuple[str, Path] | None:
    """Find the model of a folder of the hub's cache.

    Args:
        folder: a repository's folder, its ``snapshots`` folder, or the folder of one commit.

    Returns:
        the name under which to serve it, and the folder with its files; ``None`` if the folder
        does not belong to a cache.

    Raises:
        ModelLoadError: if it is not clear which model is meant, or it is not there.
    """
    folder = folder.resolve()
    if folder.parent.name == _SNAPSHOTS and (repo := repo_of_cache_folder(folder.parent.parent)):
        return _short(repo), folder
    if folder.name == _SNAPSHOTS and repo_of_cache_folder(folder.parent):
        folder = folder.parent
    repo = repo_of_cache_folder(folder)
    if repo is not None and kind_of(folder / _SNAPSHOTS) == "folder":
        return _short(repo), _snapshot(folder)
    repos = sorted(
        repo
        for name in folder_names(folder)
        if (repo := repo_of_cache_folder(Path(name)))
        and kind_of(folder / name / _SNAPSHOTS) == "folder"
    )
    if repos:
        first = f"{_CACHE_PREFIX}{repos[0].replace('/', '--')}"
        raise ModelLoadError(
            f"{folder}: is a cache of the Hugging Face hub with {len(repos)} "
            f"model{'s' if len(repos) > 1 else ''} ({listed(repos)}); give the folder of one, such "
            f"as {folder / first}"
        )
    return None


def _short(repo: str) -> str:
    return repo.rsplit("/", 1)[-1]


def _snapshot(repo_folder: Path) -> Path:
    """Return the folder of the commit that a repository in the cache stands for."""
    snapshots = repo_folder / _SNAPSHOTS
    commits = sorted(folder_names(snapshots))
    try:
        main = (repo_folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = None
    if main in commits:
        return snapshots / main
    if len(commits) == 1:
        return snapshots / commits[0]
    if not commits:
        raise ModelLoadError(f"{snapshots}: no files of this model were downloaded; download it")
    raise ModelLoadError(
        f"{repo_folder}: refs/main names none of the {len(commits)} commits here "
        f"({listed(commits)}); give the folder of one, such as {snapshots / commits[0]}"
    )


@cache
def fetch(repo: str, *, download: bool = True, weights: bool = True) -> Path:
    """Return the folder of a hub repository's model files, downloaded where they are not here.

    A process asks the hub once for each repository that it has.

    Args:
        download: false looks into the cache on this disk alone.
        weights: false fetches what is beside the weights, such as the tokenizer.

    Raises:
        ModelLoadError: if there is no such repository or no model in it, or if the hub cannot
            be reached and the cache does not hold it.
    """
    if not download:
        return _cached(
            repo,
            f"and inspect downloads nothing: run 'minserve serve --model {repo}', or "
            f"'hf download {repo}', first",
        )
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _cached(repo, "and the hub cannot be reached (HF_HUB_OFFLINE is set)")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        info = _within(ANSWER_S, lambda: HfApi().model_info(repo, timeout=ANSWER_S))
    except GatedRepoError as error:
        raise ModelLoadError(
            f"{repo!r}: its authors let only those read it who have accepted their terms: do so at "
            f"https://huggingface.co/{repo}, then run 'hf auth login' ({first_line(error)})"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelLoadError(
            f"{repo!r} is neither a folder here nor a model on the Hugging Face hub "
            f"that you may read ({first_line(error)})"
        ) from error
    except Exception as offline:  # the hub's HTTP client may raise any type without a network
        return _cached(repo, f"and the hub cannot be reached ({first_line(offline)})")
    names = {one.rfilename for one in info.siblings or ()}
    wanted = {name for name in names if _BESIDE_WEIGHTS.fullmatch(name)}
    return _download(repo, wanted | _weights_among(repo, names) if weights else wanted)


def _cached(repo: str, problem: str) -> Path:
    """Return a repository's folder in the cache.

    Raises:
        ModelLoadError: with the problem because of which only the cache counts, if it is not there.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except Exception as error:
        raise ModelLoadError(
            f"{repo!r} is not a folder here, not in the Hugging Face cache, {problem}"
        ) from error


def _weights_among(repo: str, names: set[str]) -> set[str]:
    """Return those of a repository's files that hold the weights to read.

    Raises:
        ModelLoadError: if it is no folder of a model.
    """
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    if "adapter_config.json" in names and "config.json" not in names:
        return {"adapter_config.json"}  # what it says is explained once it is here
    if "config.json" not in names or (ggufs and not any(_is_weights(name) for name in names)):
        if ggufs:
            raise ModelLoadError(
                f"{repo!r} on the Hugging Face hub holds GGUF files ({listed(ggufs)}); download one "
                f"with 'hf download {repo} {ggufs[0]}' and give the path that it prints"
            )
        raise ModelLoadError(f"{repo!r} on the Hugging Face hub has no config.json")
    found = {name for name in names if _is_weights(name)}
    safetensors = {name for name in found if name.endswith(".safetensors")}
    return safetensors or found


def _download(repo: str, names: set[str]) -> Path:
    """Download files of a repository."""
    from huggingface_hub import snapshot_download

    # A name is a pattern that fits itself; brackets would be taken for more.
    patterns = [glob.escape(name) for name in sorted(names)]
    try:
        # In a log, the hub's own bars would say nothing for as long as a download takes.
        lines = None if is_terminal() else LogProgress
        return Path(snapshot_download(repo, allow_patterns=patterns, tqdm_class=lines))
    except Exception as error:  # the hub's HTTP client may raise any type, and the disk may fill
        raise ModelLoadError(f"downloading {repo!r} failed: {first_line(error)}") from error


def _is_weights(name: str) -> bool:
    """Return whether a file of a repository holds weights, by the names that `find_weights` takes."""
    pattern = r"(?!adapter_|consolidated)[^/]+\.safetensors|pytorch_model[^/]*\.bin"
    return re.fullmatch(pattern, name) is not None


def _within(seconds: float, ask: Callable[[], _T]) -> _T:
    """Return what a function returns, which has so many seconds.

    The HTTP client's own limit does not cover looking the host's name up, which may take minutes
    on a machine that has a name server configured and no way to it.

    Raises:
        TimeoutError: if it takes longer; its thread then goes on and is not waited for.
        Exception: what the function raises.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((True, ask()))
        except Exception as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, name="minserve-hub", daemon=True)
    thread.start()
    thread.join(seconds + 0.1)
    if not outcome:
        host = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise TimeoutError(f"no answer from {host} within {seconds:g} s")
    succeeded, value = outcome[0]
    if not succeeded:
        raise value
    return value
