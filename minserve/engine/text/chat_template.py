"""Chat templates: which of a model's is used, and how a conversation is written by it.

A template is a jinja program of the model's own. It runs in jinja2's sandbox.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minserve.errors import ConfigError, InvalidRequestError

DEFAULT, TOOL_USE = "default", "tool_use"


def choose_template(templates: Mapping[str, str], setting: str) -> str:
    """Return the template that a setting asks for.

    Args:
        templates: the model's own by name.
        setting: one of these names, or a file that holds a template.

    Raises:
        ConfigError: where it is neither, or holds none that jinja can compile.
    """
    if setting in templates:
        return templates[setting]
    path = Path(setting).expanduser()
    if not path.is_file():
        names = ", ".join(f"'{name}'" for name in templates)
        be = "s are" if len(templates) > 1 else " is"
        named = f"; the model's own template{be} called {names}" if templates else ""
        raise ConfigError(f"chat_template: there is no file {setting!r}{named}")
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template: {path} cannot be read as text: {error}") from error
    if "{{" not in template and "{%" not in template:
        raise ConfigError(
            f"chat_template: {path} is no template: it has neither '{{{{' nor '{{%' of jinja"
        )
    if (problem := what_is_wrong(template)) is not None:
        raise ConfigError(f"chat_template: {path} is no valid jinja template: {problem}")
    return template


def what_is_wrong(template: str) -> str | None:
    """Return why jinja cannot compile a template; ``None`` where it can."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(template)
    except Exception as error:  # of jinja2
        return str(error)
    return None


def pick_template(templates: Mapping[str, str], *, with_tools: bool) -> str:
    """Return the template for one conversation: ``tool_use`` only where tools are given.

    Raises:
        InvalidRequestError: where the model has none, or several of which none is the default.
    """
    if with_tools and TOOL_USE in templates:
        return templates[TOOL_USE]
    if DEFAULT in templates:
        return templates[DEFAULT]
    if templates:
        raise InvalidRequestError(
            f"this model has the chat templates {', '.join(templates)} and no default; "
            "start the server with --chat-template and one of these names",
            "messages",
        )
    raise InvalidRequestError(
        "this model has no chat template, so it cannot answer chats; "
        "send a text prompt instead, or start the server with --chat-template FILE",
        "messages",
    )


def render(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    """Write a conversation as a prompt.

    Args:
        messages: dicts with ``role`` and ``content``, in order.
        variables: what else the template sees, under these names.

    Raises:
        InvalidRequestError: where the template refuses the messages or fails on them.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        # Typed as one text, but it is the texts and where the answers in them stand.
        texts = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=template,
            **variables,
        )[0]
    except Exception as error:  # a template is a program and can raise anything
        raise InvalidRequestError(
            f"the model's chat template refused the messages: {error}", "messages"
        ) from error
    return texts[0]
