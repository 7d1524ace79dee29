"""`EngineBase`: both engines load, profile and queue checked requests in the same way."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

from minserve.config import DEFAULT_MODEL, EngineConfig
from minserve.engine import guarded_planning
from minserve.engine.build import LoadedEngine, load_engine
from minserve.engine.device.own_thread import apart
from minserve.engine.device.runner import model_runner
from minserve.engine.intake import Intake, warm_up_chats
from minserve.engine.live_output import History
from minserve.engine.profile import profile_cache
from minserve.engine.profile.profile_cache import Profile
from minserve.engine.profile.profiler import measure_drafting, profile_core
from minserve.engine.profile.refinement import Refinement
from minserve.engine.sampling_defaults import default_params, load_sampling_defaults
from minserve.engine.speculation.proposer import SpeculationStats
from minserve.engine.structures.compiler import StructureCompiler
from minserve.engine.text.detokenizer import IncrementalDetokenizer
from minserve.errors import (
    ConfigError,
    DeviceLostError,
    GenerationError,
)
from minserve.outputs import OutputDelta
from minserve.planner.policies.registry import planner_class
from minserve.planner.predict.lone_request import (
    TYPICAL_TOKENS,
    describe_misses,
    lone_request_misses,
)
from minserve.planner.predict.perf_model import PerfModel
from minserve.prompts import BadWordIds, Prompt
from minserve.request import Request, Sequence
from minserve.sampling_params import SamplingParams
from minserve.slo.objectives import SLO
from minserve.slo.task_table import TaskOutcome

log = logging.getLogger(__name__)

# A rough profile, for engines that were not profiled when an SLO first asks for it.
PROBE_S = 3.0
# So many times its own time to measure, an engine waits for another process that measures.
PATIENCE = 2.0


class Submission:
    """A checked request: its sequences, ready to be queued.

    Args:
        text: the prompt, where it was given as text.
        histories: by output, what its client was told before; missing outputs have ended.
            ``None``: all outputs are new.
    """

    def __init__(
        self,
        text: str | None,
        request: Request,
        histories: Mapping[int, History] | None = None,
    ) -> None:
        self.text = text
        self.request = request
        if histories is None:
            histories = dict.fromkeys(range(request.params.n), History())
        self.histories = list(histories.values())
        self.sequences = [Sequence(request, index) for index in histories]


class EngineBase:
    """Loads the model, and turns prompts into sequences.

    Attributes:
        prompts: turns prompts into token ids, in any thread or, sent there, in another process.
        sampling_defaults: fields of `SamplingParams` that the model's generation_config.json sets,
            for requests that leave them out.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **settings: Any) -> None:
        """Load a model.

        Args:
            model: a local folder, a .gguf file, a hub id, or ``smollm2``.
            settings: fields of `EngineConfig`.

        Raises:
            ConfigError, ModelLoadError: where the settings or the model cannot be used.
        """
        self.config = EngineConfig.create(model, **settings)
        self._loaded: LoadedEngine = load_engine(self.config)
        self._core = self._loaded.core
        self._refinement: Refinement | None = None
        self._step_began: float | None = None
        self._step_ended = time.monotonic()
        self.sampling_defaults = load_sampling_defaults(self.config, self._loaded.source)
        self._intake = Intake(
            self.config,
            self._loaded.tokenizer,
            max_model_len=self._loaded.max_model_len,
            vocab_size=self._loaded.vocab_size,
            clock=self._core.clock,
            sampling_defaults=self.sampling_defaults,
        )
        self._structures = StructureCompiler(self._loaded.tokenizer, self._loaded.vocab_size)
        self._promises = self._intake.promises
        self.prompts = self._intake.prompts
        self._core.stats.add_classes(self._promises.classes)
        self.tokenizer = self._loaded.tokenizer
        self.model_name = self._loaded.source.name
        self.max_model_len = self._loaded.max_model_len
        self.vocab_size = self._loaded.vocab_size

    @property
    def slo_classes(self) -> Mapping[str, SLO]:
        """The SLO classes, by name."""
        return self._promises.classes

    @property
    def default_slo(self) -> SLO | None:
        """The SLO of requests that bring none."""
        return self._promises.default

    @property
    def default_sampling_params(self) -> SamplingParams:
        """The settings of a request that brings none: the model's own where it has some.

        ``dataclasses.replace`` makes others from it.
        """
        return default_params(self.sampling_defaults)

    @property
    def thinking_marker(self) -> str | None:
        """The text that ends this model's thinking, such as ``</think>``; or ``None``."""
        return self._promises.thinking_marker

    @property
    def perf_model(self) -> PerfModel | None:
        """The device's speed as the planner sees it; ``None`` until it was profiled."""
        return self._core.planner.model

    @property
    def task_outcomes(self) -> Mapping[TaskOutcome, int]:
        """The number of agents' tasks by outcome since the start."""
        return self._intake.tasks.table.outcomes

    @property
    def speculates(self) -> bool:
        """True where a proposer drafts tokens."""
        return self._core.proposer is not None

    @property
    def speculation_stats(self) -> SpeculationStats:
        """The running counts of drafted and accepted tokens since the start."""
        return self._core.stats.speculation

    def unattainable_classes(self) -> str:
        """Return a table of the SLO classes that even a lone request would miss; often empty."""
        if self.perf_model is None:
            return ""
        num_tokens = min(TYPICAL_TOKENS, self.max_model_len)
        misses = lone_request_misses(self.slo_classes, self.perf_model, num_tokens)
        return describe_misses(misses, num_tokens)

    def warm_up(self) -> None:
        """Load what the first chat and the first structure need, so that no request waits for it.

        Templates that no chat can use are named in the log.
        """
        warm_up_chats(self.tokenizer, self.model_name)
        self._structures.warm_up()

    def profile(self, seconds: float, *, progress: bool = False) -> Profile:
        """Take this device's speed from the cache, or measure it, and keep what was measured.

        Call it before the first request; where SLOs need it, engines call it by themselves with
        a few seconds. A profile of a few seconds is rough, and one that was measured on a busy
        machine is poor: both have a wider margin for noise. Engines that run in a loop of their
        own refine such profiles while nothing runs.

        Args:
            seconds: the longest time for measuring. A cached profile that was allowed less and
                is not complete is continued.
            progress: show a progress bar.

        Raises:
            ConfigError: for a simulated device.
        """
        if self.config.executor == "simulated":
            raise ConfigError("a simulated device has its profile already")
        key = profile_cache.profile_key(self._core, self.model_name)
        # Another process that starts here will have measured by then.
        with profile_cache.alone_with(key, PATIENCE * seconds):
            profile = profile_cache.load(key)
            if profile is None or (
                profile.allowed_s < seconds and self._refine(profile).completeness < 1.0
            ):
                profile = self._measure(seconds, progress, profile)
        model = profile.new_model()
        device = model_runner(self._core.runner).device
        costs = apart(device, lambda: measure_drafting(self._core))
        self._core.planner.model = model.with_draft_costs(*costs)
        self._refinement = self._refine(profile)
        self._core.stats.profile_completeness = self._refinement.completeness
        return profile

    def _measure(self, seconds: float, progress: bool, kept: Profile | None) -> Profile:
        """Continue the kept profile by measuring, and keep the result."""
        profile = apart(
            model_runner(self._core.runner).device,
            lambda: profile_core(
                self._core, self.model_name, seconds=seconds, progress=progress, kept=kept
            ),
        )
        if profile.is_poor:
            log.warning(
                "the measured times are hard to predict (R2 %.2f): was the machine busy? They are "
                "kept, with a margin of %.2f, and refined while the engine is idle",
                profile.quality.r2,
                profile.model.margin,
            )
        try:
            profile_cache.save(profile)
        except OSError as error:
            log.warning("the profile could not be kept: %s", error)
        return profile

    def _refine(self, profile: Profile) -> Refinement:
        return Refinement(self._core, self.model_name, profile, self._publish_profile)

    def _publish_profile(self, profile: Profile) -> None:
        """Plan by a better profile from now on."""
        planner = self._core.planner
        assert planner.model is not None, "what is refined was measured before"
        planner.model = planner.model.refined(profile.new_model())
        if self._refinement is not None and self._refinement.completeness == 1.0:
            log.info(
                "the device's profile is full now: %d batches, R2 %.3f, mean error %.1f%%, "
                "margin %.2f",
                len(profile.runs),
                profile.quality.r2,
                100 * profile.quality.mape,
                profile.model.margin,
            )

    def refine(self, idle_s: float, is_wanted: Callable[[], bool]) -> float | None:
        """Use an idle moment to refine the profile, for at most one batch.

        Args:
            idle_s: for how long there has been no work.
            is_wanted: tells whether there is work now.

        Returns:
            Seconds after which to call again, if there is still no work; ``None`` where nothing
            is left to refine.
        """
        if self._refinement is None:
            return None
        try:
            rest_s = self._refinement.step(idle_s, is_wanted)
            self._core.stats.profile_completeness = self._refinement.completeness
        except Exception:
            # No request depends on it.
            log.exception("refining the profile failed; it stays as it is")
            self._refinement = rest_s = None
        return rest_s

    def keep_profile(self) -> None:
        """At the engine's end, keep what was refined so far for the next start."""
        if self._refinement is None:
            return
        try:
            self._refinement.save()
        except Exception:
            log.exception("what was refined of the profile could not be kept")

    def _prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
        slo: SLO | str | None = None,
        age_s: float = 0.0,
        bad_word_ids: BadWordIds | None = None,
    ) -> Submission:
        """Check a request against the model and resolve its open settings."""
        self._intake.perf_model = self.perf_model
        return Submission(
            *self._intake.request(prompt, params, priority, cache_salt, slo, age_s, bad_word_ids)
        )

    def _join(self, submissions: SequenceOf[Submission], client: str = "") -> list[Submission]:
        """Return the submissions of one call with the time that its task leaves them, if it has one.

        Args:
            client: whose task it is, in the words of `Tasks.join`.
        """
        requests = self._intake.tasks.join([one.request for one in submissions], client)
        return [
            one if request is one.request else Submission(one.text, request)
            for one, request in zip(submissions, requests, strict=True)
        ]

    def _ready_for(self, slo: SLO | str | None) -> None:
        """Make sure that the device's speed is known before a promise or a draft depends on it."""
        promised = self._promises.find(slo)
        if self.perf_model is not None:
            return
        plans = planner_class(self.config.policy).promises
        if (plans and (self.speculates or promised is not None)) or (
            promised is not None and promised.needs_profile
        ):
            self.profile(PROBE_S)

    @property
    def iteration_s(self) -> float:
        """Seconds that the current iteration has taken so far; 0 between iterations."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def interrupt_hung_plan(self) -> bool:
        """Interrupt the planner if it takes much too long; a safe policy goes on in its place.

        Any thread but the core's own may call it, every second or so.

        Returns:
            True if a plan was interrupted now.
        """
        return self._core.planning.time_limit.enforce(guarded_planning.LONGEST_PLAN_S)

    def _iterate(self) -> list[OutputDelta]:
        """Run one iteration. An error in it ends the requests in flight, but not the engine.

        Raises:
            DeviceLostError: where no further iteration can succeed. The deltas that this one
                brought before are left for the core's `take_untold`.
        """
        self._step_began = time.monotonic()
        try:
            return self._core.step()
        except DeviceLostError:
            raise
        except Exception as error:
            log.exception("an iteration failed; the requests in flight are ended with an error")
            ended = self._core.abort_all(GenerationError(f"internal error: {error!r}"))
            return self._core.take_untold() + ended
        finally:
            self._step_began, self._step_ended = None, time.monotonic()

    def _enqueue(self, submission: Submission) -> None:
        """Queue a request, all outputs or, where that raises an error, none."""
        request = submission.request
        marker_ids = self._promises.marker_ids(request.slo)
        decode = self.tokenizer.decoder(request.params.preserved_tokens)
        try:
            for seq, history in zip(submission.sequences, submission.histories, strict=True):
                detokenizer = IncrementalDetokenizer(
                    decode, request.prompt_token_ids, request.params, self.tokenizer.plain_tokens
                )
                if (structure := request.params.structure) is not None:
                    seq.guide = self._structures.guide(structure)
                self._core.add(seq, detokenizer, marker_ids, history)
        except Exception:
            self._core.abort(request.request_id)
            raise
