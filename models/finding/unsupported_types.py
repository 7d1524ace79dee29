"""What a config.json describes that is not run here, in words."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

_ENCODER_TYPES = re.compile(
    r".*bert.*|electra|deberta.*|mpnet|xlnet|ernie|funnel|canine|longformer|big_bird|nomic_bert|"
    r"gte|new|clip.*|siglip.*|vit.*"
)
_ENCODER_DECODER_TYPES = re.compile(
    r".*t5|.*bart|pegasus.*|marian|m2m_100|blenderbot.*|led|prophetnet|nllb.*|fsmt|whisper|"
    r"speech_to_text|seamless.*|moonshine"
)
_STATE_SPACE_TYPES = re.compile(r".*mamba.*|rwkv.*|retnet|recurrent_gemma|xlstm|falcon_h1")
# Heads that answer with classes or vectors, by the end of the architecture's name.
_OTHER_HEADS = {
    "ForSequenceClassification": "a classifier or a reward model",
    "ForTokenClassification": "a classifier of tokens",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "ForMaskedLM": "an encoder that fills gaps in a text",
    "ForSpeechSeq2Seq": "a model that writes down speech",
    "ForConditionalGeneration": "an encoder-decoder or multimodal model",
}
# Types with code of their own, of which the same weights exist in Llama's form, and where.
_LLAMA_TWINS = {
    "internlm2": "InternLM's tools convert it into Llama's form (tools/convert2llama.py)",
    "minicpm": "openbmb publishes it in Llama's form too (names that end in -llama-format)",
    "exaone": "copies in Llama's form are published (names that end in -Llamafied)",
    "qwen": "its successors Qwen1.5 and newer (model_type qwen2, qwen3) need no code of their own",
}

_OTHER_GENERATIONS = re.compile(r"gemma(\d\w?)(_text)?$")


def explain_type(values: Mapping[str, Any], supported: Collection[str]) -> str:
    """Return why a model of another type than those supported is not run, and what to do.

    Args:
        values: the entries of its config.json.
        supported: the values of ``model_type`` that are run here.
    """
    kind = values.get("model_type")
    classes = values.get("architectures")
    named = f"model_type {kind!r} ({classes or 'no architecture named'})"
    runs = f"minserve runs {_and(supported)}"
    if kind is None:
        return (
            f"{named} is not supported: a config.json of transformers names its model_type, and "
            f"this one does not; {runs}"
        )
    return f"{named} is not supported: {_what_it_is(str(kind), values, supported)}; {runs}"


def explain_head(values: Mapping[str, Any]) -> str | None:
    """Return why a model of a supported type writes no text; ``None`` if it does."""
    for name in _architectures(values):
        for ending, words in _OTHER_HEADS.items():
            if name.endswith(ending):
                return f"{name} is {words} and generates no text; use a ...ForCausalLM of the type"
    return None


def _what_it_is(kind: str, values: Mapping[str, Any], supported: Collection[str]) -> str:
    text = values.get("text_config") or values.get("llm_config") or values.get("language_config")
    if isinstance(text, Mapping) or {"vision_config", "audio_config"} & values.keys():
        inner = text.get("model_type") if isinstance(text, Mapping) else None
        words = "it is a multimodal model, for images or sound beside text"
        if inner in supported:
            return (
                f"{words}; its text part is of type {inner!r}: use a text-only model of that type"
            )
        return words if inner is None else f"{words}, with a text part of type {inner!r}"
    if values.get("is_encoder_decoder") or _ENCODER_DECODER_TYPES.fullmatch(kind):
        return "it is an encoder-decoder, and only decoders are run"
    if _ENCODER_TYPES.fullmatch(kind):
        return "it is an encoder, for embeddings or classes, and generates no text"
    if (known := _OTHER_GENERATIONS.match(kind)) is not None:
        return f"Gemma {known[1]} is not supported, and Gemma 1 is"
    if kind in _LLAMA_TWINS:
        return _LLAMA_TWINS[kind]
    if _STATE_SPACE_TYPES.fullmatch(kind):
        return "it has recurrent or state space layers"
    for name in _architectures(values):
        for ending, words in _OTHER_HEADS.items():
            if name.endswith(ending):
                return f"it is {words}"
    if any(values.get(f"{name}_experts") for name in ("num", "num_local", "n_routed", "moe_num")):
        return "it is a mixture of experts, which minserve does not run"
    if isinstance(values.get("auto_map"), Mapping):
        code = values["auto_map"].get("AutoModelForCausalLM") or "auto_map"
        return (
            f"it is defined by Python code in its repository ({code}, trust_remote_code), and no "
            "code of a checkpoint is run"
        )
    return "this type is not known here"


def _architectures(values: Mapping[str, Any]) -> list[str]:
    names = values.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _and(names: Collection[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
