"""``minserve inspect``: the report, for people and machines, and the exit code."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minserve.cli.main import main
from minserve.exit_codes import EXIT_USAGE
from minserve.models.finding.source import EMBEDDED_DRAFT_DIR


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    """The command sets the level of its whole process."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture
def model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "tiny"))


def change(folder: Path, file: str, **values: Any) -> Path:
    path = folder / file
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(kept | values))
    return folder


def look(
    capsys: pytest.CaptureFixture[str], model: object, *flags: str, code: int = 0
) -> dict[str, Any]:
    """The report as JSON, once the exit code was as expected."""
    assert main(["inspect", str(model), "--device", "cpu", "--json", *flags]) == code
    report = json.loads(capsys.readouterr().out)
    assert report["served"] == (code == 0)
    return report


def test_the_report_for_people(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(model, "generation_config.json", temperature=0.6, top_p=0.9, max_new_tokens=12)
    assert main(["inspect", str(model), "--device", "cpu", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "would be served"
    rows = dict(line.split("  ", 1) for line in lines if "  " in line)
    told = {name: value.strip() for name, value in rows.items()}
    assert told["model"] == "tiny"
    assert told["type"] == "llama"
    assert told["form"].startswith("safetensors, 1 file")
    assert told["layers"] == "2, hidden size 64, 4 heads of 16, 2 KV heads"
    assert told["context"] == "512 tokens"
    assert told["stored as"] == "F32"
    assert told["stop tokens"] == "2 '</s>'"
    assert told["sampling"] == "temperature 0.6, top_p 0.9; max_tokens 12 for chats"
    assert "float32 on cpu" in told["would run as"]
    assert told["KV cache"] == "512 B a token, 256 KiB for the longest sequence"


def test_nothing_heavy_is_imported_but_torch(model: Path) -> None:
    code = (
        "import sys; from minserve.cli.main import main; main(sys.argv[1:]);"
        "print([m for m in ('torch._dynamo', 'aiohttp') if m in sys.modules])"
    )
    args = [sys.executable, "-c", code, "inspect", str(model), "--device", "cpu"]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    report = look(capsys, "smollm2")
    assert report["model"]["form"] == "GGUF"
    assert report["weights"]["parameters"] == 134_515_008  # as its model card says
    assert set(report["weights"]["stored"]) == {"Q4_1", "Q8_0", "F32"}
    assert report["memory"]["kv_per_sequence"] == 8192 * report["memory"]["kv_per_token"]
    assert report["tokenizer"]["chat_template"]
    assert report["sampling_defaults"] == {}


def test_what_settings_do_not_fit_is_the_reason(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = look(capsys, model, "--max-model-len", "600", code=EXIT_USAGE)
    assert report["problems"] == ["max_model_len 600: this model allows at most 512 tokens"]
    assert report["weights"]["parameters"]
    assert look(capsys, model, "--max-model-len", "300")["runs_as"]["max_model_len"] == 300


def test_every_reason_is_told_and_the_report_goes_as_far_as_it_can(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(model, "config.json", model_type="bert")
    (model / "tokenizer.json").write_text("{")
    state = load_file(model / "model.safetensors")
    report = look(capsys, model, code=EXIT_USAGE)
    assert ["encoder" in one or "tokenizer" in one for one in report["problems"]] == [True, True]
    assert sum(report["weights"]["stored"].values()) == sum(t.numel() for t in state.values())
    assert main(["inspect", str(model), "--device", "cpu"]) == EXIT_USAGE
    assert capsys.readouterr().out.splitlines()[-1].startswith("would not be served: ")


def test_weights_that_do_not_fit_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(model / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state | {"model.norm.bias": torch.ones(3)}, model / "model.safetensors")
    report = look(capsys, model, code=EXIT_USAGE)
    (problem,) = report["problems"]
    assert "'model.norm.weight'" in problem
    assert "'model.norm.bias'" in report["warnings"][0]
    assert report["memory"]["weights"]


def test_warnings_do_not_keep_a_model_from_being_served(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("config.json", "generation_config.json"):
        change(model, file, eos_token_id=None)
    change(model, "generation_config.json", top_p=7)
    change(model, "tokenizer_config.json", eos_token=None)
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    report = look(capsys, model)
    for expected in ("no token ends an output", "top_p is left out"):
        assert [one for one in report["warnings"] if expected in one]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("some-org/some-model", "minserve serve --model some-org/some-model"),
        ("./no/such/folder", "no model at"),
    ],
)
def test_what_is_not_there_is_one_line(
    name: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")
    assert main(["inspect", name]) == EXIT_USAGE
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("would not be served: ")
    assert says in line


def rows(capsys: pytest.CaptureFixture[str], model: object, *flags: str) -> dict[str, str]:
    """The report for people, by the first words of its lines."""
    main(["inspect", str(model), "--device", "cpu", *flags])
    lines = [line.partition("  ") for line in capsys.readouterr().out.splitlines()]
    return {name: value.strip() for name, _, value in lines}


def test_weights_that_are_kept_in_two_forms_are_told(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dtype in ("bfloat16", "float32"):
        form = look(capsys, model, "--dtype", dtype)["runs_as"]["weight_format"]
        told = rows(capsys, model, "--dtype", dtype)["memory"]
        assert ("(two forms, for speed)" in told) == (form == "onednn-and-fp16")


def test_a_setting_that_no_model_has_is_the_reason(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = look(capsys, model, "--max-model-len", "0", code=EXIT_USAGE)
    assert report["problems"] == ["max_model_len must be at least 1, not 0"]


def test_a_broken_generation_config_is_one_reason_or_left_out(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "generation_config.json").write_text("{")
    report = look(capsys, model, code=EXIT_USAGE)
    (problem,) = report["problems"]
    assert problem.endswith("; correct it, or start with --generation-config off")
    assert report["warnings"] == []
    report = look(capsys, model, "--generation-config", "off")
    assert [one["id"] for one in report["tokenizer"]["stop_tokens"]] == [2]


def test_the_chat_template_that_is_used_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.jinja", tmp_path / "bad.jinja"
    good.write_text("{{ messages[0].content }}")
    bad.write_text("{% if %}")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    change(model, "tokenizer_config.json", chat_template=good.read_text())
    assert rows(capsys, model)["chat template"] == "the model's own"
    given = rows(capsys, model, "--chat-template", str(good))
    assert given["chat template"] == f"{good}, by --chat-template"
    report = look(capsys, model, "--chat-template", str(bad), code=EXIT_USAGE)
    assert [one for one in report["problems"] if "bad.jinja" in one] == report["problems"]
    assert report["tokenizer"]["stop_tokens"]
    assert report["tokenizer"]["chat_template_given"] is None
    change(model, "tokenizer_config.json", chat_template=bad.read_text())
    (warning,) = look(capsys, model)["warnings"]
    assert warning.startswith("the chat template 'default' does not compile")


def test_a_draft_model_is_checked_too(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = Path(shutil.copytree(model, tmp_path / "draft"))
    found = look(capsys, model, "--draft-model", str(draft))
    assert found["draft_model"]["name"] == "draft"
    assert found["draft_model"]["parameters"] == found["weights"]["parameters"]
    state = load_file(draft / "model.safetensors")
    norms = [name for name in state if name.endswith("norm.weight")]
    kept = {name: one for name, one in state.items() if name not in norms}
    save_file(kept, draft / "model.safetensors")
    (problem,) = look(capsys, model, "--draft-model", str(draft), code=EXIT_USAGE)["problems"]
    assert f"{len(norms)} tensors missing" in problem
    change(draft, "config.json", vocab_size=7)
    (problem,) = look(capsys, model, "--draft-model", str(draft), code=EXIT_USAGE)["problems"]
    assert "a draft model needs the model's vocabulary" in problem


def test_a_draft_model_that_borrows_embeddings_needs_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = look(capsys, "smollm2", "--draft-model", "smollm2-draft")
    stored = sum(t.numel() for name, t in load_file(EMBEDDED_DRAFT_DIR / "model.safetensors").items()
                 if name != "lm_head.token_ids")  # fmt: skip
    assert report["draft_model"]["parameters"] == stored
