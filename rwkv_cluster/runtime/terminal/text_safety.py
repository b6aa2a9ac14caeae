"""Text of unknown origin on its way to a person: what would command the terminal or reorder the line is written out."""

from __future__ import annotations

import logging
import re

# C0 but tab and line feed, DEL, C1, separators that end a line, and overrides of the writing direction.
_COMMANDING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""`text` with control characters, but tab and line feed, as escapes: \x1b. Any other text stays as it is."""
    return _COMMANDING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class VisibleFormatter(logging.Formatter):
    """Log lines through `visible`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line as it is shown."""
        return visible(super().format(record))
