"""Documents of a source: the written rules of what is accepted, and the message for what is not.

JSONL, one document a line (message: `file:line: reason`):

- UTF-8 only. A byte order mark at the start of the file is dropped. Lines end with LF or CRLF; the last line may
  lack its end; blank lines are skipped.
- Each line is one JSON object by RFC 8259, with at most 1,000 or so nested levels and at most 32 MiB. NaN and Infinity
  are refused. Where a key occurs twice, the last one counts. Other fields are ignored.
- `text_field` holds a string, or a list of integers (not 1.0, not true). A lone surrogate escape is refused; an
  escaped NUL (backslash u0000) is text like any other, a raw one is not JSON.
- What is another format altogether (see `refused_formats`) is refused, whatever `skip_bad_lines` says.
- `skip_bad_lines` leaves out the lines that break a rule above, counts them and reports the first ones. It does not
  cover text that the tokenizer cannot encode.

Text files, one document each: UTF-8, a byte order mark at the start is dropped, nothing else is changed (line ends
stay as they are). A text of white space only holds nothing to learn: such documents are left out and counted, in JSONL
too, and so is an empty list. What is another format altogether is refused by its name.

Arrays: integers, or floating-point numbers that are whole; not booleans. 1-D arrays are cut into documents of
`sequence_length`, the shorter rest kept; each row of a 2-D array is a document. `.npy` never runs pickled code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from rwkv_cluster.data.inputs.bad_lines import ONE_A_LINE, SPLIT_ARRAY, BadLine, bad_bytes, bad_json
from rwkv_cluster.data.inputs.refused_formats import HEAD_BYTES, format_error, named_format, refuse_format
from rwkv_cluster.data.inputs.sources import Source, read_blocks
from rwkv_cluster.errors import DataError

MAX_LINE_BYTES = 32 << 20
_BLOCK_BYTES = 1 << 20
_BLOCK_VALUES = 1 << 19
_BOM = b"\xef\xbb\xbf"
_JSON_SPACE = b" \t\r\n"


@dataclass(frozen=True)
class LineBlock:
    """Whole lines of a JSONL file. too_long: one line (`data` is empty) that exceeds MAX_LINE_BYTES."""

    path: Path
    first_line: int
    data: bytes
    too_long: bool = False

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Line number and content of each line that is not blank."""
        for number, line in enumerate(self.data.split(b"\n"), self.first_line):
            if stripped := line.strip(_JSON_SPACE):
                yield number, stripped


def document_blocks(source: Source, digest: Any = None) -> Iterator[bytes]:
    """`read_blocks` of text or JSONL, which raises DataError as well where the content is another format's."""
    blocks, head = read_blocks(source, digest), b""
    for block in blocks:
        head += block
        if len(head) >= HEAD_BYTES:
            break
    if not source.optional:
        refuse_format(source.path, head[:HEAD_BYTES], source.kind)
    if head:
        yield head
    yield from blocks


def refuse_by_name(sources: Iterable[Source]) -> None:
    """Raises DataError for the first file whose name promises a format that is not read, before anything is read."""
    for source in sources:
        promised = named_format(source.path) if source.kind == "text" and not source.optional else None
        if promised is not None:
            next(document_blocks(source), b"")  # what it holds says more than its name
            raise format_error(source.path, promised, source.kind)


def line_blocks(source: Source, digest: Any = None) -> Iterator[LineBlock]:
    """The lines of a file in blocks of about 1 MiB."""
    rest, number, dropping, first = b"", 1, False, True
    for block in document_blocks(source, digest):
        if first:
            block, first = block.removeprefix(_BOM), False
        cut = block.rfind(b"\n") + 1
        if dropping and cut:  # the end of a line that was too long
            start = block.find(b"\n") + 1
            number, dropping, block, cut = number + 1, False, block[start:], cut - start
        if dropping:
            continue
        if cut == 0:
            rest += block
        else:
            whole = rest + block[:cut]
            yield from _split_long(LineBlock(source.path, number, whole))
            number, rest = number + whole.count(b"\n"), block[cut:]
        if len(rest) > MAX_LINE_BYTES:
            yield LineBlock(source.path, number, b"", too_long=True)
            rest, dropping = b"", True
    if rest:
        yield from _split_long(LineBlock(source.path, number, rest))


def _split_long(block: LineBlock) -> Iterator[LineBlock]:
    data, number = block.data, block.first_line
    while len(data) > MAX_LINE_BYTES:
        cut = data.rfind(b"\n", 0, MAX_LINE_BYTES + 1) + 1
        if cut:
            yield LineBlock(block.path, number, data[:cut])
        else:
            yield LineBlock(block.path, number, b"", too_long=True)
            cut = (data.find(b"\n") + 1) or len(data)
        number, data = number + data.count(b"\n", 0, cut), data[cut:]
    if data:
        yield LineBlock(block.path, number, data)


def _refuse_constant(name: str) -> NoReturn:
    raise BadLine(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_KIND_NAMES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def kind_name(value: object) -> str:
    """What a JSON value is, for messages."""
    return _KIND_NAMES.get(type(value), "a number")


def parse_object(line: bytes, field: str) -> dict[str, Any]:
    """The object of a JSONL line. field: one that it should have, for the message. Raises BadLine."""
    record = _parse_json(line)
    if type(record) is list and record and type(record[0]) in (dict, list, str):
        raise BadLine(f"is a JSON array; {ONE_A_LINE}", SPLIT_ARRAY)
    if type(record) is not dict:
        raise BadLine(f'is {kind_name(record)}, expected an object like {{"{field}": ...}}')
    return record


def field_names(record: dict[str, Any]) -> str:
    """Which fields an object has, for messages."""
    return ", ".join(f'"{key[:40]}"' for key in list(record)[:5]) or "no fields"


def parse_line(line: bytes, field: str) -> str | list[int]:
    """The document of a JSONL line: a string or a list of integers. Raises BadLine."""
    record = parse_object(line, field)
    if field not in record:
        raise BadLine(f'has no field "{field}" (it has {field_names(record)}); data.text_field names the field to read')
    value = record[field]
    if type(value) is str:
        refuse_lone_surrogates(line, [value], f'"{field}"')
    elif type(value) is list:
        require_integers(value, field)
    else:
        raise BadLine(f'"{field}" is {kind_name(value)}, expected a string or a list of integers')
    return value


def require_integers(values: list[Any], field: str) -> None:
    """Raises BadLine where a list of the field is not all integers."""
    for index, element in enumerate(values) if not set(map(type, values)) <= {int} else ():
        if type(element) is not int:
            raise BadLine(f'"{field}" has {kind_name(element)} that is no integer at index {index}')


def _parse_json(line: bytes) -> Any:
    end = None
    try:
        text = line.decode("utf-8")
        value, end = _DECODER.raw_decode(text)
        return value if end == len(text) else _DECODER.decode(text)  # decode, for its error
    except UnicodeDecodeError as error:
        raise BadLine(f"is not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise (bad_bytes(line) or bad_json(text, end, error)) from None
    except RecursionError:
        raise BadLine("is nested too deeply") from None
    except ValueError:  # int() refuses numbers of more than 4,300 digits
        raise BadLine("has a number with too many digits") from None


def refuse_lone_surrogates(line: bytes, texts: list[str], what: str) -> None:
    """Raises BadLine where texts of the line have half a surrogate pair, as only an escape can make.

    what: the texts' name in the message.
    """
    if b"\\" not in line or not _SURROGATE_ESCAPE.search(line):
        return
    text = "".join(texts)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadLine(f"{what} has a lone surrogate, U+{ord(text[error.start]):04X}, which is no character") from None


def decode_text(data: bytes, path: Path) -> str:
    """Text of a whole file. Raises DataError with the byte offset of what is not UTF-8."""
    offset = len(_BOM) if data.startswith(_BOM) else 0
    try:
        return data[offset:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start + offset) from None


def not_utf8(path: Path, position: int) -> DataError:
    """The error for a text file that is not UTF-8 at byte `position`."""
    return DataError(
        f"{path}: is not UTF-8 text at byte {position}", remedy="Convert it, or leave it out by data.file_pattern"
    )


@dataclass(frozen=True)
class Values:
    """Rows of an array on their way to documents. rows: [n, L], any integer or whole floating-point type.

    name: of the array, for messages. first: index of rows[0, 0] in a 1-D array, or the row number in a 2-D array.
    """

    name: str
    rows: np.ndarray
    first: int
    one_dimensional: bool

    def place(self, row: int, column: int) -> str:
        """Where an element is, in the terms of the array that the user gave."""
        if self.one_dimensional:
            return f"{self.name}: index {self.first + row * self.rows.shape[1] + column}"
        return f"{self.name}: row {self.first + row}, column {column}"

    def check_whole(self) -> None:
        """Raises DataError naming the first value that is not whole."""
        if self.rows.dtype.kind == "f":
            self._refuse(~(np.floor(self.rows) == self.rows) | np.isinf(self.rows), "is not a whole number")

    def check_range(self, largest: int, noun: str) -> None:
        """Raises DataError naming the first value that is not in 0..largest."""
        if self.rows.size and (self.rows.min() < 0 or self.rows.max() > largest):
            self._refuse((self.rows < 0) | (self.rows > largest), f"is out of range: {noun} must be 0 to {largest}")

    def _refuse(self, wrong: np.ndarray, reason: str) -> None:
        if wrong.any():
            row, column = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
            value = self.rows[row, column]
            raise DataError(f"{self.place(int(row), int(column))}: {value} {reason}", remedy="Correct the data")


def as_array(data: Any, name: str) -> np.ndarray:
    """A NumPy array of what a caller gave as one. Raises DataError for what an array cannot hold, or not all of."""
    if isinstance(data, np.ma.MaskedArray) and data.mask.any():
        raise DataError(
            f"{name} is a masked array with {int(data.mask.sum()):,} masked values, and a token cannot be missing",
            remedy="Leave them out (compressed()) or fill them (filled(value))",
        )
    try:
        return np.asarray(data)
    except ValueError as error:
        raise DataError(
            f"{name} has rows of different lengths, which no array can hold", remedy=f"W{_ROWS[1:]}"
        ) from error
    except (TypeError, RuntimeError) as error:  # a tensor of a GPU, of bfloat16, or with gradients
        reason = _first_line(error).rstrip(".")
        raise DataError(
            f"{name}, a {type(data).__name__}, cannot be made a NumPy array: {reason}",
            remedy="Give integers on the CPU, as tensor.detach().cpu().int().numpy() makes",
        ) from error


_ROWS = 'write rows of different lengths as JSONL, {"text": [1, 2, 3]} a line'


def check_array(array: np.ndarray, name: str) -> None:
    """Raises DataError for an array that cannot be documents, whatever its values."""
    kind = array.dtype.kind
    if kind == "O":
        held = f", the first a {type(array.flat[0]).__name__}" if array.size else ""
        raise DataError(f"{name} holds Python objects{held}, expected integers", remedy=f"Use astype(int), or {_ROWS}")
    if kind in "UST":
        raise DataError(
            f"{name} holds text (dtype {array.dtype}), expected integers",
            remedy='Convert numbers with astype(int), or write each text as JSONL, {"text": "..."} a line',
        )
    if kind not in "iuf":
        content = "booleans" if kind == "b" else f"values of dtype {array.dtype}"
        raise DataError(f"{name} holds {content}, expected integers", remedy="Convert it, e.g. with astype(int)")
    if array.ndim not in (1, 2):
        raise DataError(f"{name} has shape {array.shape}, expected 1 or 2 dimensions", remedy="Reshape it")
    if array.size == 0:
        raise DataError(f"{name} is empty (shape {array.shape})", remedy="Give it at least one value")


def array_values(array: np.ndarray, name: str, sequence_length: int) -> Iterator[Values]:
    """An array in memory as blocks of rows of one length each."""
    check_array(array, name)
    yield from _cut(array.shape, lambda start, stop: array[start:stop], name, sequence_length)


def npy_values(path: Path, name: str, sequence_length: int) -> Iterator[Values]:
    """A `.npy` file as blocks of rows, read without touching a memory map (but for 2-D arrays in Fortran order), so
    that memory stays small and a file that shrinks is an error."""
    try:
        mapped = np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
    except (OSError, ValueError, EOFError) as error:
        _refuse_other_file(path, name)
        raise DataError(
            f"{name}: cannot be read as a .npy array ({_first_line(error)})", remedy="Save it again with numpy.save"
        ) from error
    check_array(mapped, name)
    if mapped.flags.c_contiguous:
        yield from _stored_rows(path, name, sequence_length, mapped)
    else:
        yield from _cut(mapped.shape, lambda start, stop: np.array(mapped[start:stop]), name, sequence_length)


def _refuse_other_file(path: Path, name: str) -> None:
    """Raises DataError where a file that cannot be mapped is of another format, or holds Python objects."""
    with open(path, "rb") as handle:
        refuse_format(Path(name), handle.read(HEAD_BYTES), "array")
        handle.seek(0)
        try:
            version = np.lib.format.read_magic(handle)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            dtype = read(handle)[2]
        except ValueError:
            return
    if dtype.hasobject:
        raise DataError(
            f"{name} holds Python objects, expected integers", remedy=f"Save it with astype(int), or {_ROWS}"
        )


def _stored_rows(path: Path, name: str, sequence_length: int, header: np.memmap) -> Iterator[Values]:
    """Rows in C order. header: only its shape, dtype and offset are used."""
    shape, dtype, offset = header.shape, header.dtype, header.offset
    width = shape[1] if len(shape) == 2 else 1
    with open(path, "rb", buffering=0) as handle:

        def read(start: int, stop: int) -> np.ndarray:
            handle.seek(offset + start * width * dtype.itemsize)
            block = np.fromfile(handle, dtype, (stop - start) * width)
            if block.size != (stop - start) * width:
                raise DataError(f"{name}: became shorter while it was being read")
            return block.reshape(-1, width) if len(shape) == 2 else block

        yield from _cut(shape, read, name, sequence_length)


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0] or type(error).__name__


def _cut(shape: tuple[int, ...], read: Any, name: str, sequence_length: int) -> Iterator[Values]:
    """`read(start, stop)` gives a part along the first axis."""
    if len(shape) == 2:
        step = max(1, _BLOCK_VALUES // shape[1])
        for start in range(0, shape[0], step):
            yield Values(name, read(start, min(start + step, shape[0])), start, one_dimensional=False)
        return
    whole = shape[0] // sequence_length * sequence_length
    step = max(1, _BLOCK_VALUES // sequence_length) * sequence_length
    for start in range(0, whole, step):
        rows = read(start, min(start + step, whole)).reshape(-1, sequence_length)
        yield Values(name, rows, start, one_dimensional=True)
    if whole < shape[0]:
        yield Values(name, read(whole, shape[0]).reshape(1, -1), whole, one_dimensional=True)
