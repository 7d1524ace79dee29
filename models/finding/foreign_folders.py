"""What a folder holds that is no model in a form that can be read here, in words."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from minserve.errors import ModelLoadError, UnsupportedModelError
from minserve.models.finding.files import file_names, folder_names, listed
from minserve.models.finding.json_file import read_json

_WANTED = (
    "a model here is a folder with config.json, the tokenizer's files, and weights in "
    "*.safetensors or pytorch_model*.bin; or a GGUF file"
)
# What the names of files tell of a folder's form, and what to do about it; the first that fits.
_FORMS: tuple[tuple[str, str], ...] = (
    (
        r"model_index\.json",
        "holds a pipeline of the library diffusers, which makes images and no text",
    ),
    (
        r"(consolidated\.\d+\.pth|tokenizer\.model\.checklist\.chk)",
        "holds a model in the original form of Meta's Llama (consolidated.*.pth, params.json). "
        "Convert it with transformers' convert_llama_weights_to_hf.py, or download the files "
        "config.json, tokenizer.json and model*.safetensors of the same model",
    ),
    (
        r"consolidated(-\d+-of-\d+)?\.safetensors",
        "holds consolidated.safetensors alone, Mistral's own form with other tensor names. "
        "Download the files model*.safetensors, config.json and tokenizer.json of the same model",
    ),
    (
        r".*\.distcp|__\d+_\d+\.distcp|zero_to_fp32\.py|.*_optim_states\.pt",
        "holds a training checkpoint in parts (torch.distributed, FSDP or DeepSpeed). Join it "
        "first: 'accelerate merge-weights' or zero_to_fp32.py, then save_pretrained",
    ),
    (
        r".*\.nemo",
        "holds a model of NVIDIA NeMo. Export it to Hugging Face's form first",
    ),
    (
        r"(rank\d+\.engine|.*\.engine)",
        "holds an engine built by TensorRT-LLM. Use the model from which it was built",
    ),
    (
        r"weights(\.\d+)?\.npz",
        "holds weights of MLX in NumPy's form. Use the Hugging Face model from which it was "
        "converted",
    ),
    (
        r"(tf_model(-\d+-of-\d+)?\.h5|tf_model\.h5\.index\.json|model\.ckpt\..*|saved_model\.pb)",
        "holds weights of TensorFlow alone. Load them with transformers before 5 (from_tf=True) "
        "and save_pretrained, or use a copy with model.safetensors",
    ),
    (
        r"flax_model(-\d+-of-\d+)?\.msgpack",
        "holds weights of Flax alone. Load them with transformers before 5 (from_flax=True) and "
        "save_pretrained, or use a copy with model.safetensors",
    ),
    (
        r".*\.(onnx|onnx_data)",
        "holds a model of ONNX. Use the Hugging Face model from which it was exported",
    ),
    (
        r"openvino_model.*",
        "holds a model of OpenVINO. Use the Hugging Face model from which it was exported",
    ),
    (
        r".*\.(pth|pt|ckpt)",
        "holds weights of torch in a form of their own. Load them into the model's class in "
        "transformers and write them with save_pretrained",
    ),
)
_MOST_SUBFOLDERS = 200


def explain_folder(folder: Path) -> ModelLoadError:
    """Return the error of a folder in which there is no model that could be read.

    The error says what the folder holds, as far as names of files tell, and what to do.
    """
    names = file_names(folder)
    if "adapter_config.json" in names:
        return explain_adapter(folder)
    below = folder_names(folder)
    words = _form_of(names | {f"{one}.onnx" for one in below if one == "onnx"})
    if words is not None:
        return UnsupportedModelError(f"{folder}: {words}")
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    if ggufs:
        return ModelLoadError(
            f"{folder}: holds {len(ggufs)} GGUF files; give the path of one: {listed(ggufs)}"
        )
    if any(name.endswith((".incomplete", ".part", ".crdownload")) for name in names):
        return ModelLoadError(f"{folder}: a download is not complete; run it again")
    inside = [name for name in sorted(below)[:_MOST_SUBFOLDERS] if _is_model(folder / name)]
    if inside:
        return ModelLoadError(
            f"{folder}: no model here, but in {len(inside)} of its folders; give the path of one: "
            f"{listed([str(folder / name) for name in inside], 3)}"
        )
    if "config.json" in names:
        return ModelLoadError(
            f"{folder}: no weights here; looked for *.safetensors, pytorch_model*.bin and *.gguf. "
            "Download them, or see whether the download ended early"
        )
    if not names and not below:
        return ModelLoadError(f"{folder}: this folder is empty; {_WANTED}")
    return ModelLoadError(
        f"{folder}: no config.json in this folder, so it is not a model; {_WANTED}"
    )


def explain_file(path: Path) -> ModelLoadError:
    """Return the error of a file that is no model in a form that can be read here."""
    words = _form_of({path.name})
    if words is not None:
        return UnsupportedModelError(f"{path}: {words.replace('holds', 'is of', 1)}")
    if (path.parent / "config.json").is_file():
        return ModelLoadError(
            f"{path}: is one file of a model and not the model; give its folder, {path.parent}"
        )
    return ModelLoadError(f"{path}: a model is a .gguf file or a folder with a config.json")


def explain_adapter(folder: Path) -> UnsupportedModelError:
    """Return the error of a folder with an adapter of the library PEFT."""
    try:
        settings = read_json(folder / "adapter_config.json")
    except ModelLoadError:
        settings = {}
    kind = settings.get("peft_type") or "LoRA"
    base = settings.get("base_model_name_or_path") or "the model for which it was trained"
    return UnsupportedModelError(
        f"{folder}: holds a {kind} adapter of the library PEFT and no model. Merge it into its base "
        f"model {base} first: load both with peft.AutoPeftModelForCausalLM, then "
        "merge_and_unload() and save_pretrained()"
    )


def _form_of(names: Collection[str]) -> str | None:
    """Return what the names of files tell of a form that is not read here; ``None`` if nothing."""
    for pattern, words in _FORMS:
        if any(re.fullmatch(pattern, name) for name in names):
            return words
    return None


def _is_model(folder: Path) -> bool:
    """Return whether a folder looks like a model, by the names in it."""
    try:
        names = file_names(folder)
    except ModelLoadError:
        return False
    return "config.json" in names or any(name.lower().endswith(".gguf") for name in names)
