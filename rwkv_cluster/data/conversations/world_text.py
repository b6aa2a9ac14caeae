"""Text of World models, "User: ...\\n\\nAssistant: ...", back to turns; also its older forms.

A text is of the form whose name of a speaker it begins with. A speaker's name counts after a blank line alone, so an
answer may have "User:" in a line of its own, but not after a blank line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rwkv_cluster.data.conversations.turns import Role, Turn
from rwkv_cluster.data.inputs.bad_lines import BadLine


@dataclass(frozen=True)
class _Form:
    """Speakers of one form. joined: names whose texts go on the turn before, after a line end."""

    roles: dict[str, Role]
    joined: tuple[str, ...] = ()

    def speakers(self, text: str) -> list[re.Match[str]]:
        """Where somebody begins to speak; group 1 is the name."""
        return list(re.finditer(rf"(?:\A|\n\n)({'|'.join(self.roles)}):", text))


_FORMS = (
    _Form({"System": "system", "User": "user", "Assistant": "assistant"}),
    _Form({"Instruction": "user", "Input": "user", "Response": "assistant"}, joined=("Input",)),
    _Form({"Q": "user", "A": "assistant"}),
    _Form({"Question": "user", "Answer": "assistant"}),
)


def parse_world_text(text: str) -> tuple[Turn, ...]:
    """The turns of a text. Raises BadLine for a text of no such form."""
    text = text.replace("\r\n", "\n").strip()
    for form in _FORMS:
        speakers = form.speakers(text)
        if speakers and speakers[0].start() == 0:
            return _turns(text, form, speakers)
    start = text[:40].split("\n")[0]
    raise BadLine(f'begins with "{start}", expected "User:", "System:" or another speaker of World text')


def _turns(text: str, form: _Form, speakers: list[re.Match[str]]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for speaker, following in zip(speakers, [*speakers[1:], None], strict=True):
        said = text[speaker.end() : following.start() if following else len(text)].strip()
        if speaker[1] in form.joined and turns:
            if said:
                turns[-1] = Turn(turns[-1].role, f"{turns[-1].text}\n{said}")
        else:
            turns.append(Turn(form.roles[speaker[1]], said))
    return tuple(turns)
