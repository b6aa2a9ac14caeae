"""What a file that is no input of ours is, by its first bytes and then by its name, and how to make an input of it.

A format is looked for where it could be taken for text, and where its name says more than "not UTF-8". Text that only
resembles a format is left alone: a `.txt` may begin with a brace or hold a page of HTML.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from rwkv_cluster.errors import DataError

HEAD_BYTES = 512  # tar says what it is at byte 257


@dataclass(frozen=True)
class Format:
    """A kind of file. remedy: what to do about it, with the placeholders of `fill_in`."""

    what: str
    remedy: str


def _archive(name: str, unpack: str) -> Format:
    return Format(f"{name} archive", f"Unpack it ({unpack}) and name the folder")


def _compressed(name: str, unpack: str) -> Format:
    return Format(f"compressed with {name}", f"Decompress it ({unpack}); gzip and zstd are read as they are")


def _table(separator: str, option: str) -> Format:
    script = f"import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader(sys.stdin{option})]"
    convert = f'CAT | python3 -c "{script}" > NEW.jsonl'
    return Format(f"a table of {separator}-separated values", f"Convert it ({convert}) and name the column in {_FIELD}")


def _columns(name: str, read: str) -> Format:
    return Format(f"{name} table", f"Convert it in Python ({read}) and name the column in {_FIELD}")


_FIELD = "data.text_field"
_WEIGHTS = "Weights go into training.init_from, arrays of integers into .npy by numpy.save"
_NO_TEXT = "Leave it out by data.file_pattern"
_EXPORT = "Save it as text"
_TAR = _archive("a tar", "tar xf FILE")
_ZIP = _archive("a zip", "unzip FILE")
_SEVEN_ZIP = _archive("a 7z", "7z x FILE")
_RAR = _archive("a rar", "unrar x FILE")
_GZIP = Format("compressed with gzip", "Give it a name that ends with .gz, or decompress it")
_ZSTD = Format("compressed with zstd", "Give it a name that ends with .zst, or decompress it")
_BZIP2 = _compressed("bzip2", "bunzip2 FILE")
_XZ = _compressed("xz", "unxz FILE")
_LZ4 = _compressed("lz4", "unlz4 FILE")
_CSV = _table("comma", "")
_TSV = _table("tab", ", delimiter='\\t'")
_PARQUET = _columns("a Parquet", "pandas.read_parquet(PATH).to_json(LINES, orient='records', lines=True)")
_FEATHER = _columns("a Feather", "pandas.read_feather(PATH).to_json(LINES, orient='records', lines=True)")
_ARROW = _columns("an Arrow", "datasets.Dataset.from_file(PATH).to_json(LINES)")
_AVRO = Format("an Avro table", "Write its rows as JSONL")
_ORC = _columns("an ORC", "pandas.read_orc(PATH).to_json(LINES, orient='records', lines=True)")
_TFRECORD = Format("a file of TFRecords", "Write its examples as JSONL")
_EXCEL = _columns("an Excel", "pandas.read_excel(PATH).to_json(LINES, orient='records', lines=True)")
_HDF5 = Format("an HDF5 file", "Save its array in Python with numpy.save")
_NPZ = Format("an .npz archive of arrays", "Save each array with numpy.save as a .npy of its own")
_NPY = Format("a NumPy array, which its name does not say", "Give it a name that ends with .npy")
_INDEX = Format("the index of a token file", "Name the pair PREFIX.bin and PREFIX.idx, and PREFIX in data.inputs")
_PICKLE = Format("a Python pickle, which could run code", "Save arrays with numpy.save and texts as JSONL")
_TORCH = Format("a file of torch.save", _WEIGHTS)
_SAFETENSORS = Format("a safetensors file", _WEIGHTS)
_GGUF = Format("a GGUF model", _NO_TEXT)
_SQLITE = Format("an SQLite database", "Write the texts of its table as JSONL")
_PDF = Format("a PDF", f"{_EXPORT} (pdftotext FILE)")
_OFFICE = Format("an office document", _EXPORT)
_EPUB = Format("an EPUB book", f"{_EXPORT} (pandoc FILE -t plain -o NEW.txt)")
_NOTEBOOK = Format("a Jupyter notebook", f"{_EXPORT} (jupyter nbconvert --to markdown FILE)")
_IMAGE = Format("an image", _NO_TEXT)
_AUDIO = Format("audio", _NO_TEXT)
_VIDEO = Format("video", _NO_TEXT)
_PROGRAM = Format("a compiled program", _NO_TEXT)
_LFS = Format("a git-lfs pointer and not the file itself", "Fetch the file (git lfs pull)")
_HTML = Format("an HTML page, such as a server's error message", "Download the file again")
_ZEROS = Format("a file of zero bytes, such as an unfinished download or a crash leaves", "Make it again")

_MAGIC = tuple(
    (re.compile(magic, re.DOTALL), found)
    for magic, found in (
        (rb"version https://git-lfs\.github\.com/spec/", _LFS),
        (rb".{257}ustar[\0 ]", _TAR),
        (rb"7z\xbc\xaf\x27\x1c", _SEVEN_ZIP),
        (rb"Rar!\x1a\x07", _RAR),
        (rb"\x1f\x8b\x08", _GZIP),
        (rb"\x28\xb5\x2f\xfd", _ZSTD),
        (rb"BZh[1-9]1AY&SY", _BZIP2),
        (rb"\xfd7zXZ\0", _XZ),
        (rb"\x04\x22\x4d\x18", _LZ4),
        (rb"PAR1\x15", _PARQUET),
        (rb"ARROW1\0\0", _FEATHER),
        (rb"\xff{4}.{3}\0", _ARROW),
        (rb"Obj\x01", _AVRO),
        (rb"\x89HDF\r\n", _HDF5),
        (rb"\x93NUMPY", _NPY),
        (rb"MMIDIDX\0\0", _INDEX),
        (rb"GGUF[\x01-\x03]\0", _GGUF),
        (rb"SQLite format 3\0", _SQLITE),
        (rb"%PDF-1\.|%PDF-2\.", _PDF),
        (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1|\{\\rtf1", _OFFICE),
        (rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|II\*\0|MM\0\*|RIFF.{4}WEBP|\0\0\x01\0[\x01-\xff]\0", _IMAGE),
        (rb"RIFF.{4}WAVE|OggS\0|fLaC\0|ID3[\x02-\x04]|\xff[\xf2\xf3\xfb]", _AUDIO),
        (rb"RIFF.{4}AVI |\0\0\0.ftyp|\x1a\x45\xdf\xa3", _VIDEO),
        (rb"\x7fELF|MZ\x90\0|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe|\0asm", _PROGRAM),
        (rb"\x80[\x02-\x05]", _PICKLE),
    )
)
_COMPRESSIONS = (_GZIP, _ZSTD, _BZIP2, _XZ, _LZ4)
_PRINT = {".gz": "zcat", ".zst": "zstdcat", ".bz2": "bzcat", ".xz": "xzcat"}
_ENCODINGS = (  # byte order marks, the longer before those that they begin with
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_SUFFIXES = {  # of files that are never plain text, or text that stands for something else
    **dict.fromkeys((".tar", ".tgz", ".tbz2", ".txz"), _TAR),
    **dict.fromkeys((".zip", ".jar", ".whl"), _ZIP),
    **dict.fromkeys((".hdf5", ".h5"), _HDF5),
    **dict.fromkeys((".tfrecord", ".tfrecords"), _TFRECORD),
    **dict.fromkeys((".pkl", ".pickle", ".joblib"), _PICKLE),
    **dict.fromkeys((".pth", ".ckpt"), _TORCH),
    **dict.fromkeys((".sqlite", ".sqlite3"), _SQLITE),
    **dict.fromkeys((".docx", ".pptx", ".odt", ".odp", ".rtf"), _OFFICE),
    **dict.fromkeys((".xls", ".xlsx", ".ods"), _EXCEL),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ico", ".heic"), _IMAGE),
    **dict.fromkeys((".mp3", ".wav", ".flac", ".ogg", ".m4a", ".opus"), _AUDIO),
    **dict.fromkeys((".mp4", ".mkv", ".avi", ".mov", ".webm"), _VIDEO),
    **dict.fromkeys((".exe", ".dll", ".dylib", ".pyc"), _PROGRAM),
    ".7z": _SEVEN_ZIP,
    ".arrow": _ARROW,
    ".avro": _AVRO,
    ".bz2": _BZIP2,
    ".csv": _CSV,
    ".epub": _EPUB,
    ".feather": _FEATHER,
    ".gguf": _GGUF,
    ".ipynb": _NOTEBOOK,
    ".lz4": _LZ4,
    ".npz": _NPZ,
    ".orc": _ORC,
    ".parquet": _PARQUET,
    ".pdf": _PDF,
    ".rar": _RAR,
    ".safetensors": _SAFETENSORS,
    ".tsv": _TSV,
    ".xz": _XZ,
}
_HTML_START = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|body)[\s>]", re.IGNORECASE)


def named_format(path: Path) -> Format | None:
    """The format that a file's name promises; None for text and for whatever is read here."""
    return _SUFFIXES.get(_decompressed(path).suffix.lower()) or _SUFFIXES.get(path.suffix.lower())


def refuse_format(path: Path, head: bytes, kind: str) -> None:
    """Raises DataError that names the format of a file where its first bytes show one that `kind` cannot hold.

    head: at least HEAD_BYTES of the decompressed content, where there are as many. kind: as of a Source.
    """
    file_format = _by_content(head, kind)
    if file_format in _COMPRESSIONS:
        file_format = named_format(path) or file_format  # a .tgz is an archive
    if file_format is not None:
        raise format_error(path, file_format, kind)


def format_error(path: Path, found: Format, kind: str) -> DataError:
    """The error for a file of another format."""
    expected = {"text": "plain text", "jsonl": "JSONL", "array": "a .npy array", "tokens": "a token file"}[kind]
    otherwise = "" if found.remedy == _NO_TEXT or kind != "text" else ", or leave it out by data.file_pattern"
    return DataError(f"{path} is {found.what}, not {expected}", remedy=f"{fill_in(found.remedy, path)}{otherwise}")


def fill_in(remedy: str, path: Path) -> str:
    """A remedy for the file `path`: its placeholders become words that can be copied.

    FILE: the path. CAT: a command that prints the content. NEW: the path without its suffix. All three are quoted for a
    shell. PATH, LINES: the path, and that of a .jsonl beside it, as Python strings.
    """
    stem = _decompressed(path).with_suffix("")
    file = shlex.quote(str(path))
    words = {"FILE": file, "NEW": shlex.quote(str(stem)), "CAT": f"{_PRINT.get(path.suffix.lower(), 'cat')} {file}"}
    words |= {"PATH": repr(str(path)), "LINES": repr(f"{stem}.jsonl")}
    return re.sub(r"\b(FILE|NEW|CAT|PATH|LINES)\b", lambda match: words[match[1]], remedy)


def _decompressed(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in _PRINT else path


def _by_content(head: bytes, kind: str) -> Format | None:
    for magic, file_format in _MAGIC:
        if magic.match(head) and not (file_format is _NPY and kind == "array"):
            return file_format
    if head.startswith(b"PK\x03\x04"):
        return _zip_of(head)
    if 0 < int.from_bytes(head[:8], "little") < 1 << 27 and head.startswith((b'{"', b"{ "), 8):
        return _SAFETENSORS
    if kind in ("text", "jsonl") and len(head) == HEAD_BYTES and not head.strip(b"\0"):
        return _ZEROS
    if kind in ("jsonl", "array") and _HTML_START.match(head):
        return _HTML
    return _encoding(head) if kind in ("text", "jsonl") else None


def _zip_of(head: bytes) -> Format:
    """What a zip file holds, by the name of its first entry."""
    first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if first.endswith(b".npy"):
        return _NPZ
    if first.endswith(b"/data.pkl"):
        return _TORCH
    if first == b"mimetype":
        return _EPUB if b"epub" in head else _OFFICE
    return _OFFICE if first == b"[Content_Types].xml" else _ZIP


def _encoding(head: bytes) -> Format | None:
    """UTF-16 and UTF-32: by their byte order mark, or as ASCII characters with a zero byte each."""
    name = next((name for mark, name in _ENCODINGS if head.startswith(mark)), None)
    if name is None and len(head) >= 8:
        for label, characters, zeros in (("UTF-16LE", head[0::2], head[1::2]), ("UTF-16BE", head[1::2], head[0::2])):
            if 0 not in characters and zeros.count(0) > 0.9 * len(zeros):
                name = label
    return None if name is None else Format(f"{name} text", f"Convert it (CAT | iconv -f {name} -t UTF-8 > NEW.utf8)")
