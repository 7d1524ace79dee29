"""Which chat template is used: the model's, one of several by name, or a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from minserve import Engine
from minserve.config import EngineConfig
from minserve.engine.intake import load_tokenizer
from minserve.engine.text.tokenizer import Tokenizer
from minserve.errors import ConfigError, InvalidRequestError
from minserve.models.finding.source import find_model

CHAT = [{"role": "user", "content": "Hi"}]
NAMED = [{"name": name, "template": f"{name}!"} for name in ("default", "tool_use", "rag")]


@pytest.fixture
def folder(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "m"))


def set_template(folder: Path, value: object) -> None:
    for file in folder.glob("*.jinja"):
        file.unlink()
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"chat_template": value}
    path.write_text(json.dumps(settings))


def load(folder: Path, setting: str | None = None) -> Tokenizer:
    return load_tokenizer(EngineConfig(model=str(folder), chat_template=setting))


def test_a_file_takes_the_place_of_the_models_template(folder):
    file = folder / "mine.jinja"
    file.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert load(folder, str(file)).render_chat(CHAT) == "<Hi>"
    assert load(folder).render_chat(CHAT) != "<Hi>"


def test_a_model_without_template_can_chat_with_a_file(tiny_opt_dir, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}{{ eos_token }}")
    tokenizer = load(tiny_opt_dir, str(file))
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(CHAT) == "Hi</s>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b"You are helpful.", "is no template"),
        (b"{% for m in messages %}", "no valid jinja template"),
    ],
)
def test_a_file_that_is_no_template_is_refused_at_the_start(folder, content, message):
    file = folder / "mine.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"chat_template: .*mine\.jinja.*{message}|{message}"):
        load(folder, str(file))


def test_several_templates_are_chosen_by_name(folder):
    set_template(folder, NAMED)
    tokenizer = load(folder)
    assert tokenizer.chat_template_names == ("default", "tool_use", "rag")
    assert tokenizer.render_chat(CHAT) == "default!"
    assert tokenizer.render_chat(CHAT, tools=[{"type": "function"}]) == "tool_use!"
    assert load(folder, "rag").render_chat(CHAT, tools=[{"type": "function"}]) == "rag!"
    with pytest.raises(ConfigError, match=r"'novel'.*'default', 'tool_use', 'rag'"):
        load(folder, "novel")


def test_several_templates_without_a_default_need_a_choice(folder):
    set_template(folder, NAMED[1:])
    with pytest.raises(InvalidRequestError, match="tool_use, rag and no default"):
        load(folder).render_chat(CHAT)
    assert load(folder, "rag").render_chat(CHAT) == "rag!"


def test_files_of_templates_come_before_the_settings(folder):
    set_template(folder, "in the settings {{ 1 }}")
    (folder / "chat_template.json").write_text('{"chat_template": "in json"}')
    assert load(folder).render_chat(CHAT) == "in the settings 1"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag!")
    (folder / "chat_template.jinja").write_text("in a file")
    assert load(folder).render_chat(CHAT) == "in a file"
    assert load(folder, "rag").render_chat(CHAT) == "rag!"


def test_the_file_of_processors_is_read_where_there_is_no_other(folder):
    set_template(folder, None)
    (folder / "chat_template.json").write_text('{"chat_template": "in json"}')
    assert load(folder).render_chat(CHAT) == "in json"


def test_a_template_of_the_models_that_is_no_jinja_is_said_at_the_start(folder, caplog):
    """Texts can still be completed, so the model is not refused."""
    set_template(folder, [NAMED[0], {"name": "rag", "template": "{% for m in messages %}"}])
    engine = Engine(str(folder), num_blocks=8)
    engine.warm_up()
    (line,) = [one for one in caplog.messages if "jinja" in one]
    assert line.startswith(f"{engine.model_name}: chats will be refused")
    assert "'rag'" in line
    assert "Unexpected end of template" in line
    with pytest.raises(InvalidRequestError, match="Unexpected end of template"):
        load(folder, "rag").render_chat(CHAT)


@pytest.mark.parametrize("settings", [{}, {"executor": "simulated", "profile": "opt-6.7b-a100"}])
def test_an_engine_uses_the_template_of_its_settings(folder, settings):
    file = folder / "mine.jinja"
    file.write_text("<{{ messages[0].content }}>")
    engine = Engine(str(folder), chat_template=str(file), num_blocks=8, **settings)
    assert engine.tokenizer.render_chat(CHAT) == "<Hi>"


def test_named_templates_survive_saving(folder, tmp_path):
    from transformers import AutoTokenizer

    set_template(folder, NAMED)
    (tmp_path / "saved").mkdir()
    Tokenizer.load(find_model(str(folder))).save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.apply_chat_template(CHAT, tokenize=False, chat_template="rag") == "rag!"
