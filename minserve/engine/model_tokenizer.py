"""`load_model_tokenizer`: the tokenizer that an engine's settings ask for."""

from __future__ import annotations

from minserve.config import EngineConfig
from minserve.engine.text.tokenizer import Tokenizer, has_tokenizer
from minserve.errors import ModelLoadError
from minserve.models.finding.source import ModelSource


def load_model_tokenizer(config: EngineConfig, source: ModelSource) -> Tokenizer:
    """Load the tokenizer for a model.

    Args:
        source: the model of the settings.

    Raises:
        ModelLoadError: where there is none, or it cannot be read.
        ConfigError: where there is no such chat template as the settings ask for.
    """
    try:
        return Tokenizer.load(
            source,
            config.tokenizer,
            chat_template=config.chat_template,
            generation_config=config.generation_config != "off",
        )
    except ModelLoadError as error:
        if config.tokenizer is None and source.gguf_file and not has_tokenizer(source):
            raise ModelLoadError(
                f"{source.gguf_file}: holds no tokenizer; say where it is by --tokenizer FOLDER"
            ) from error
        raise
