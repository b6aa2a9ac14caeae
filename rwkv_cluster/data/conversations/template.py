"""`data.template`: how a conversation becomes text. A template is a class with `identity` and `pieces`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from rwkv_cluster.data.conversations import g1
from rwkv_cluster.data.conversations.turns import Conversation, Question
from rwkv_cluster.errors import ConfigError, MissingDataError
from rwkv_cluster.workdir import sha256_file


class Template(Protocol):
    """Makes text of conversations.

    identity: what tells it from other templates, for manifests. thinking: texts that an answer begins with so that the
    model thinks ("on") or does not ("off"); empty where the template has none.
    """

    identity: str
    thinking: Mapping[str, str]

    def pieces(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """Texts that are encoded one by one, each with whether it is trained on. Raises BadLine."""

    def ask(self, question: str, *, system: str = "", goes_on: bool = False) -> Question:
        """The text of a user's question, as in training. goes_on: behind an answer, as `answered` gives it."""

    def answered(self, answer: str) -> str:
        """The text of an answer after which the conversation goes on, encoded as one piece in training too."""


def load_template(name: str) -> Template:
    """The template `g1`, or that of a Jinja file. Raises MissingDataError or ConfigError."""
    if name == g1.NAME:
        return g1.G1Template()
    path = _file(name)
    try:
        from rwkv_cluster.data.conversations.jinja_template import JinjaTemplate
    except ImportError as error:
        raise ConfigError(
            f"data.template {path} is a Jinja file, and jinja2 is not installed",
            remedy="`pip install 'rwkv-cluster[jinja2]'` installs it",
        ) from error
    return JinjaTemplate(path)


def template_identity(name: str) -> str:
    """`load_template(name).identity`, without compiling it."""
    return g1.NAME if name == g1.NAME else f"jinja:{sha256_file(_file(name))}"


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_file():
        raise MissingDataError(
            f"data.template is '{name}', which is no file", remedy=f"Use {g1.NAME}, or name a Jinja file"
        )
    return path
