"""Prompts to tokens, as the model's folder has it: its tokenizer, and its chat template for messages."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from prefilld.text_tokens import open_tokens

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class ChatRefused(ValueError):
    """Messages cannot become a prompt. The message says why."""


class ModelPrompts:
    """Tokens of prompts and text of answers. Safe to use from several threads.

    chat_refusal: why messages are refused, or "" where the model has a chat template.
    """

    def __init__(self, folder: Path):
        """Raises prefilld.text_tokens.NoTokenizer, or ValueError for files that cannot be read."""
        self._tokens = open_tokens(folder)
        self.decode = self._tokens.decode
        self._template, self.chat_refusal = None, ""
        try:
            self._template = ChatTemplate(folder)
        except ChatRefused as error:
            self.chat_refusal = str(error)

    def of_text(self, text: str) -> list[int]:
        return self._tokens.encode(text)

    def of_messages(self, messages: list[dict], variables: dict[str, Any]) -> list[int]:
        """Raises ChatRefused. variables: what the template sees beside the messages, such as tools."""
        if self._template is None:
            raise ChatRefused(self.chat_refusal)
        # The template writes the beginning token itself, where the model wants one.
        return self._tokens.encode(self._template.render(messages, variables), special_tokens=False)


class ChatTemplate:
    """The Jinja template of a Hugging Face folder: chat_template.jinja, or chat_template in tokenizer_config.json.

    It runs in Jinja's sandbox and sees what transformers shows to it.
    """

    def __init__(self, folder: Path):
        """Raises ChatRefused where the folder has no template, or one that Jinja cannot read."""
        config = _read_config(folder / "tokenizer_config.json")
        text = _template_text(folder, config)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ChatRefused(f"the model's chat template cannot be read: {error}") from None
        self._variables = {name: token for name in _SPECIAL_TOKENS if (token := _token_text(config.get(name)))}

    def render(self, messages: list[dict], variables: dict[str, Any]) -> str:
        try:
            text = self._template.render(
                **{**self._variables, "add_generation_prompt": True, **variables, "messages": messages}
            )
            text.encode()  # a name or a role may have half a surrogate pair, which no tokenizer takes
            return text
        except Exception as error:  # a template may raise whatever its expressions do
            raise ChatRefused(f"the model's chat template refuses the messages: {error}") from None


def _read_config(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ChatRefused(f"{file.name} cannot be read: {error}") from None
    return config if isinstance(config, dict) else {}


def _template_text(folder: Path, config: dict[str, Any]) -> str:
    own_file = folder / "chat_template.jinja"
    if own_file.exists():
        return own_file.read_text()
    template = config.get("chat_template")
    if isinstance(template, list):  # several with names
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ChatRefused("the model has no chat template, neither in tokenizer_config.json nor in chat_template.jinja")
    return template


def _token_text(token: Any) -> str | None:
    """A special token stands as text, or as an object that has its text as content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes for HTML, which models have never seen."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
