"""Tiny models with random weights, built once per session: real files, no downloads."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from example_scripts import load_example
from lost_device import LostDevicePlugin

from minserve.engine.device.transfers import is_lost
from minserve.machine import Machine
from shared.interpreter import quicken_interpreter

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined: without a GPU its interpreter runs them.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A GPU machine runs tests that do without it.
with suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # How long an example takes says more about the machine than about the code.
    settings.register_profile(
        "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("untimed")

EOS_TOKEN = "</s>"
SPECIAL_TOKENS = ["<unk>", "<s>", EOS_TOKEN, "<|im_start|>", "<|im_end|>"]
TOKENIZER_SIZE = 500  # at most; the text below gives fewer merges
MODEL_VOCAB_SIZE = 512  # wider than the tokenizer, as padded real models are
MAX_POSITIONS = 512
THREADS = torch.get_num_threads()

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog while the rain in Spain stays mainly in the plain.",
    "A server answers requests; a planner decides which tokens of which request run next.",
    "Grüße aus Köln: naïve café, 東京の天気, Привет мир, ¿qué tal? 🙂 and 1 234 567.89 others.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
]

# Files that take ten seconds of a processor and more. Whichever of them came last would run while
# all other workers have nothing left to do. The first one trains the pairs, the others find them.
LONGEST_FIRST = (
    "engine/speculation/test_draft_kv.py",
    "bench/test_kernels_compile.py",
    "bench/test_gpu_script.py",
    "controller/test_faults.py",
    "models/test_parity.py",
    "models/test_smollm2.py",
    "engine/ranks/test_rank_groups.py",
    "controller/test_controller.py",
    "controller/test_torchrun.py",
    "planner/policies/test_dp.py",
    "engine/speculation/test_speculation.py",
    "engine/test_triton_engine.py",
    "engine/speculation/test_verification.py",
    "engine/speculation/test_embedded_draft.py",
    "engine/test_any_requests.py",
    "engine/sampling/test_sampler.py",
    "bench/test_paired_runs.py",
    "test_names.py",
    "server/test_containers.py",
    "cli/test_cli_outputs.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, as workers do that are told to keep the order."""
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_configure(config: pytest.Config) -> None:
    """A GPU that is lost is lost for all further tests of a process."""
    if torch.cuda.is_available():
        gpu = torch.device("cuda")
        config.pluginmanager.register(LostDevicePlugin(lambda: is_lost(gpu)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """As many workers as may run at once; xdist itself counts the host's cores."""
    allowed = Machine.look().num_processes
    return allowed if allowed < (os.cpu_count() or 1) else None


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Profiles of tiny models stay out of the user's cache, and no idle engine measures beside a
    test that does not ask for it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minserve.engine.profile.refinement.FIRST_IDLE_S", 3600.0)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick_kernels() -> None:
    """The interpreter, where tests that use it were collected."""
    if "triton" in sys.modules and "TRITON_INTERPRET" in os.environ:
        quicken_interpreter()


@pytest.fixture(autouse=True)
def _threads_as_at_first() -> None:
    """An engine sets torch's threads for the whole process. Those of an earlier test's would share
    the cores with the other workers' ever after, and wait for each other behind each operation.
    """
    torch.set_num_threads(THREADS)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler of SIGINT, here and in the processes that the test starts.

    Where it was ignored from the start, as in a shell's background job, they would ignore it too.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with grouped-query attention and a chat template, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    ids = _save_tokenizer(folder, CHAT_TEMPLATE)
    config = LlamaConfig(
        vocab_size=MODEL_VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.2,  # the usual 0.02 makes every next token nearly as likely
        tie_word_embeddings=False,
        **ids,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_opt_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer OPT without a chat template, in float32."""
    from transformers import OPTConfig, OPTForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-opt"
    ids = _save_tokenizer(folder, None)
    config = OPTConfig(
        vocab_size=MODEL_VOCAB_SIZE,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        init_std=0.2,
        pad_token_id=0,
        **ids,
    )
    torch.manual_seed(1)
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama_pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained Llama of two layers and a draft of it: a `Pair` of the example that trains."""
    return _train_pair(_shared_folder(tmp_path_factory), "llama")


@pytest.fixture(scope="session")
def tiny_opt_pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained OPT of two layers and a draft of it."""
    return _train_pair(_shared_folder(tmp_path_factory), "opt")


def _shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all workers of this run."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "pairs"
    folder.mkdir(exist_ok=True)
    return folder


def _train_pair(folder: Path, family: str) -> Any:
    """Train a pair, or take that of another worker.

    It is trained on one thread: sums in another order would give other models.
    """
    example = load_example("train_tiny_pair")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (folder / f"{family}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return example.train_pair(folder / family, family, example.SMALL, progress=False)
    finally:
        torch.set_num_threads(threads)


def _save_tokenizer(folder: Path, chat_template: str | None) -> dict[str, int]:
    """Train a byte-level BPE tokenizer, save it, and return its special ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token=EOS_TOKEN
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
