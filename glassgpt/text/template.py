"""Chat templates: a conversation as one string, by the Jinja text that comes with a model (or ours)."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassgpt.config import UserError
from glassgpt.config.errors import first_line

if TYPE_CHECKING:
    import jinja2

TEMPLATE_FILE = "chat_template.jinja"
FACTS_FILE = "tokenizer_config.json"
BEGIN = "{{ bos_token }}"
DEFAULT = (
    "{% for message in messages %}"
    "{{ '' if loop.first else '\n\n' }}### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}"
    "{% endfor %}"
    "{{ '\n\n### Assistant:\n' if add_generation_prompt else '' }}"
)
"""Ours: plain words that any vocabulary has, and the end-of-text token after every answer. BEGIN goes before it where the
vocabulary has a token that begins texts."""


@dataclass(frozen=True)
class Template:
    """The words around the messages of a chat."""

    source: str
    """Jinja, as Hugging Face's `chat_template`: sees messages, add_generation_prompt, bos_token, eos_token."""
    begin: str = ""
    """What the source calls bos_token."""
    end: str = ""
    """What the source calls eos_token."""

    def render(self, messages: Sequence[Mapping[str, str]], *, reply: bool = False) -> str:
        """The conversation as one string; with `reply`, up to where the assistant's next answer begins.

        The template is run in a sandbox. Raises UserError for one that cannot be read or that refuses these messages.
        """
        try:
            return _compiled(self.source).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=reply,
                bos_token=self.begin,
                eos_token=self.end,
                tools=None,
                documents=None,
                enable_thinking=False,  # or some open a thought in what they serve that no training text has
            )
        except Exception as error:  # a template is a program: anything may go wrong in it
            roles = ", ".join(str(message["role"]) for message in messages)
            raise UserError(f"the model's chat template refuses this conversation ({roles}): {first_line(error)}") from error

    def save(self, folder: Path) -> None:
        """Write the template and its two tokens under Hugging Face's names."""
        (folder / TEMPLATE_FILE).write_text(self.source, encoding="utf-8")
        (folder / FACTS_FILE).write_text(json.dumps({"bos_token": self.begin, "eos_token": self.end}) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Template | None:
        """The template that lies in a folder, None where there is none. Raises UserError for files that cannot be read."""
        try:
            facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8")) if (folder / FACTS_FILE).is_file() else {}
            source: Any = None
            if (folder / TEMPLATE_FILE).is_file():
                source = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
            else:
                source = facts.get("chat_template")
            if isinstance(source, list):  # several by name
                source = {entry["name"]: entry["template"] for entry in source}.get("default")
            if source is None:
                return None
            return cls(str(source), _token(facts.get("bos_token")), _token(facts.get("eos_token")))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{folder}: cannot read the chat template ({TEMPLATE_FILE}, {FACTS_FILE}): {error}") from error


def _token(value: Any) -> str:
    """A token as `tokenizer_config.json` has it: text, an object with `content`, or null."""
    return str(value["content"]) if isinstance(value, dict) else str(value or "")


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # here: most texts are no chats

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    # marks for another library's loss mask write nothing, but take the white space around them as every tag does
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
    return environment.from_string(re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source))


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)
