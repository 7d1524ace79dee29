"""`Promises` turns the SLOs that requests ask for into seconds on this device."""

from __future__ import annotations

from collections.abc import Mapping

from minserve.chat_formats import find_reasoning_format
from minserve.config import EngineConfig
from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import ConfigError
from minserve.planner.predict.perf_model import PerfModel
from minserve.slo.objectives import SLO, Targets, preset_classes
from minserve.slo.slo_fields import find_class, load_classes


class Promises:
    """The SLO classes of an engine, and what they mean on its device.

    Attributes:
        classes: the classes by name.
        default: the SLO of requests that bring none; ``None`` promises them nothing.
        thinking_marker: the text that ends this model's thinking, or ``None``.

    Raises:
        ConfigError: for a classes file that cannot be read or an unknown default class.
    """

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.classes = _classes(config.slo_classes)
        if config.default_slo is not None and config.default_slo not in self.classes:
            known = ", ".join(sorted(self.classes))
            raise ConfigError(f"default_slo {config.default_slo!r} is no SLO class; known: {known}")
        self.default = None if config.default_slo is None else self.classes[config.default_slo]
        self.thinking_marker = config.thinking_marker
        if self.thinking_marker is None:
            form = find_reasoning_format(
                config.reasoning_format,
                tokenizer.chat_template,
                lambda text: self._token_of(text) is not None,
            )
            self.thinking_marker = None if form is None else form.end

    def find(self, slo: SLO | str | None) -> SLO | None:
        """Return the SLO in force: the one given, the class of that name, or the default.

        Raises:
            InvalidSLOError: for an unknown class.
        """
        if slo is None:
            return self.default
        return slo if isinstance(slo, SLO) else find_class(slo, self.classes, "slo")

    def targets(self, slo: SLO, num_prompt_tokens: int, model: PerfModel | None) -> Targets:
        """Return the SLO in seconds for a prompt of that length.

        Args:
            model: needed where the SLO is a multiple of the device's speed.
        """
        if model is None:
            if slo.needs_profile:
                raise ConfigError("an SLO as a slowdown needs a performance profile")
            return slo.resolve(0.0, 0.0)
        return slo.resolve(
            model.zero_load_prefill_s(num_prompt_tokens),
            model.zero_load_decode_s(num_prompt_tokens),
        )

    def marker_ids(self, slo: SLO | None) -> Mapping[str, int]:
        """Return those of the SLO's stage markers that are a single token, with their ids."""
        markers = () if slo is None else [s.until for s in slo.stages if s.until is not None]
        found = {marker: self._token_of(marker) for marker in markers}
        return {marker: token for marker, token in found.items() if token is not None}

    def _token_of(self, text: str) -> int | None:
        return self._tokenizer.token_of(text)


def _classes(given: str | Mapping[str, SLO] | None) -> Mapping[str, SLO]:
    if given is None:
        return preset_classes()
    if isinstance(given, str):
        return load_classes(given)
    return {**preset_classes(), **{name: slo.named(name) for name, slo in given.items()}}
