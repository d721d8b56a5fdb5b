"""Chat templates: rendering them, and keeping control tokens out of what users write."""

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .checkpoints.base import import_optional

# Supplementary private use: one code point stands in for the first character of a control token.
_PRIVATE = range(0xF0000, 0xFFFFE)


class Disguise:
    """Marks control tokens that stand in untrusted strings, so that a template cannot revive them.

    The first character of each occurrence is replaced by a code point that occurs nowhere else. All
    other text stays as it is, so a template that trims or splits a message does what it always
    does; and as characters map one to one, offsets into disguised text hold for the revealed one.

    Args:
        control_tokens: The strings to disguise.
        texts: Everything that the stand-ins must not occur in.
    """

    def __init__(self, control_tokens: Iterable[str], texts: Iterable[str]) -> None:
        tokens = sorted(token for token in control_tokens if token)
        taken = set().union(*texts)
        free = (chr(point) for point in _PRIVATE if chr(point) not in taken)
        self._stand_ins = {first: next(free) for first in {token[0] for token in tokens}}
        # A lookahead, because occurrences may overlap and each must go.
        alternatives = "|".join(map(re.escape, tokens)) or r"(?!)"
        self._start = re.compile(f"(?=(?:{alternatives}))(.)", re.DOTALL)
        self._reveal = {ord(mark): first for first, mark in self._stand_ins.items()}

    def hide(self, value: Any) -> Any:
        """Disguise control tokens in every string of a JSON-like value, keys excepted."""
        match value:
            case str():
                return self._start.sub(lambda found: self._stand_ins[found[1]], value)
            case Mapping():
                return {key: self.hide(item) for key, item in value.items()}
            case list() | tuple():
                return [self.hide(item) for item in value]
            case _:
                return value

    def hides_in(self, text: str) -> bool:
        """Whether the text has anything disguised in it."""
        return any(ord(character) in self._reveal for character in text)

    def reveal(self, text: str) -> str:
        """Undo the disguise; same length."""
        return text.translate(self._reveal)


def render_chat(
    template: str, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str]
) -> str:
    """Render a model's own chat template up to where the assistant speaks.

    Args:
        template: The Jinja source; it runs in a sandbox, with the functions and whitespace rules
            that transformers gives it.
        messages: Role and content of each turn; keys whose value is None are left out.
        special_tokens: ``bos_token`` and the like, which templates write by name.

    Raises:
        ValueError: If the template is invalid or refuses the messages.
        ImportError: If ``jinja2`` is not installed.

    References:
        https://huggingface.co/docs/transformers/chat_templating_writing
    """
    jinja2 = import_optional("jinja2", "applying a chat template")
    environment = _environment()
    try:
        return environment.from_string(template).render(
            **special_tokens,
            messages=[
                {key: value for key, value in message.items() if value is not None} for message in messages
            ],
            tools=None,
            documents=None,
            add_generation_prompt=True,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the model's chat template rejects the messages: {error}") from error


def _environment() -> Any:
    jinja2 = import_optional("jinja2", "applying a chat template")
    sandbox = import_optional("jinja2.sandbox", "applying a chat template")
    extensions = import_optional("jinja2.ext", "applying a chat template")

    class Generation(extensions.Extension):
        """Accepts the tags around what the assistant says; only training needs their spans."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, extensions.loopcontrols]
    )
    # Jinja's own filter escapes HTML and non-ASCII, which no model was trained on.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
