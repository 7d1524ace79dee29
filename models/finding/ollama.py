"""Models that Ollama has downloaded: GGUF files under the names of their SHA-256 sums.

``manifests/<host>/<namespace>/<name>/<tag>`` is a JSON file that lists the layers of a model, and
``blobs/sha256-<digest>`` are the layers; that of the media type below is the GGUF file. Format:
https://github.com/ollama/ollama (server/manifest.go and server/layer.go).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.finding.files import is_gguf, kind_of, listed
from minserve.models.finding.json_file import read_json

_MODEL, _ADAPTER = (f"application/vnd.ollama.image.{kind}" for kind in ("model", "adapter"))
_MANIFESTS, _BLOBS = "manifests", "blobs"
_BLOB_PREFIX = "sha256-"
_DEFAULT_TAG = "latest"
# Of a digest, in the name of a model that no manifest names.
_SHORT_DIGEST = 12


def find_ollama_model(folder: Path) -> tuple[str, Path] | None:
    """Find the model of Ollama that a folder stands for.

    Args:
        folder: Ollama's folder of models (or the one above it), its blobs or manifests, or any
            folder below the manifests.

    Returns:
        the name under which to serve the model, and its GGUF file; ``None`` if the folder is not
        Ollama's.

    Raises:
        ModelLoadError: if it stands for no model or for several, which the error lists.
    """
    store = _store_of(folder)
    if store is None:
        return None
    manifests = store / _MANIFESTS
    inside = folder if folder.is_relative_to(manifests) else manifests
    found = sorted(path for path in inside.rglob("*") if path.is_file())
    # The tags of one model may stand for the same file.
    if len(found) == 1 or (found and len({_digest(path) for path in found}) == 1):
        return read_manifest(found[0])
    if not found:
        raise ModelLoadError(
            f"{inside}: Ollama lists no models here; give the path of a GGUF file among "
            f"{store / _BLOBS}, or download the model with 'ollama pull NAME'"
        )
    lines = [f"{_name(path)} ({path})" for path in found]
    raise ModelLoadError(
        f"{folder}: holds {len(found)} models of Ollama: {listed(lines)}; name one by the path of "
        "its manifest, as in the brackets"
    )


def read_manifest(manifest: Path) -> tuple[str, Path]:
    """Return the name and the GGUF file of the model that a manifest describes.

    Raises:
        ModelLoadError: if it is no manifest, or its model is not on this disk.
        UnsupportedModelError: if an adapter belongs to the model.
    """
    layers = _layers(read_json(manifest))
    if _ADAPTER in layers:
        raise UnsupportedModelError(
            f"{manifest}: this model of Ollama is one with a LoRA adapter beside it, which is not "
            "supported; merge the adapter into the model first"
        )
    store = _store_of(manifest.parent)
    if _MODEL not in layers or store is None:
        raise ModelLoadError(f"{manifest}: names no model; it is no manifest of Ollama")
    blob = store / _BLOBS / layers[_MODEL].replace(":", "-")
    if not is_gguf(blob):
        problem = "is missing" if kind_of(blob) is None else "is not a GGUF file"
        raise ModelLoadError(
            f"{blob}: the file of the model {_name(manifest)} {problem}; run "
            f"'ollama pull {_name(manifest)}'"
        )
    return _name(manifest), blob


def is_manifest(path: Path) -> bool:
    """Return whether a file lies where Ollama keeps its manifests."""
    store = _store_of(path.parent)
    return store is not None and path.is_relative_to(store / _MANIFESTS)


def name_of_blob(blob: Path) -> str | None:
    """Return the name under which to serve a blob of Ollama; ``None`` for another file.

    It is that of the first manifest that lists the blob, else a part of its digest.
    """
    if not blob.name.startswith(_BLOB_PREFIX):
        return None
    digest = blob.name.replace("-", ":", 1)
    store = _store_of(blob.parent)
    for path in sorted((store / _MANIFESTS).rglob("*")) if store else ():
        if path.is_file() and _digest(path) == digest:
            return _name(path)
    return blob.name[: len(_BLOB_PREFIX) + _SHORT_DIGEST]


def _store_of(folder: Path) -> Path | None:
    """Return Ollama's folder of models that holds a folder, is it, or is right below it."""
    for one in (folder, folder / "models", *folder.parents):
        if kind_of(one / _MANIFESTS) == "folder" and kind_of(one / _BLOBS) == "folder":
            return one
    return None


def _layers(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the digest of each layer of a manifest by its media type."""
    layers = manifest.get("layers")
    return {
        str(layer.get("mediaType")): str(layer.get("digest"))
        for layer in (layers if isinstance(layers, list) else ())
        if isinstance(layer, dict)
    }


def _digest(manifest: Path) -> str | None:
    """Return the digest of the GGUF file that a manifest lists; ``None`` if it lists none."""
    try:
        return _layers(read_json(manifest)).get(_MODEL)
    except ModelLoadError:
        return None


def _name(manifest: Path) -> str:
    """Return Ollama's name of a model, by the path of its manifest, without the usual tag."""
    name, tag = manifest.parent.name, manifest.name
    return name if tag == _DEFAULT_TAG else f"{name}:{tag}"
