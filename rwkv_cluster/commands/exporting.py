"""export and merge: the weights of a run, its adapter, or any others, in the files of other programs."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_cluster.commands.loading import importing_torch
from rwkv_cluster.commands.subcommand import Result, Subcommand
from rwkv_cluster.errors import ConfigError
from rwkv_cluster.runtime.terminal.nearest import suggestion

if TYPE_CHECKING:
    from rwkv_cluster.interchange.export.write import Exported

EXPORT_FORMATS = ("pth", "safetensors", "fla", "transformers", "st", "gguf-folder")
"""The keys of `interchange.export.table.FORMATS`, which takes too long to import for `--help`."""

ADAPTER_FORMATS = ("peft", "peft-fla")
"""The keys of `adapters.peft_folder.LAYOUTS_BY_FORMAT`."""

_DTYPES = "bf16, fp16 or fp32"


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="WORK_DIR_OR_WEIGHTS", help="a run's directory, or weights of any layout")
    parser.add_argument(
        "--format", metavar="FORMAT", required=True, help=", ".join((*EXPORT_FORMATS, *ADAPTER_FORMATS))
    )
    parser.add_argument("--dtype", metavar="DTYPE", help=f"{_DTYPES}; default the run's precision, or the file's own")
    parser.add_argument("--output", metavar="PATH", help="default below WORK_DIR/out, or beside the weights")
    parser.add_argument("--merged", action="store_true", help="the base with the run's adapter in it")
    parser.add_argument("--vocab-file", metavar="PATH", help="vocabulary of weights outside a work directory")
    parser.add_argument("--force", action="store_true", help="replace another export of that name")


def export(options: argparse.Namespace) -> Result:
    """Write weights in another program's format. Raises ConfigError for a bad option."""
    with importing_torch():
        from rwkv_cluster.interchange.export.table import FORMATS
        from rwkv_cluster.interchange.export.write import DTYPES, export
        from rwkv_cluster.train.checkpoint.export_source import source_of
    if options.format in ADAPTER_FORMATS:
        return _export_adapter(options)
    if options.format not in FORMATS:
        names = (*FORMATS, *ADAPTER_FORMATS)
        raise ConfigError(
            f"--format {options.format} is not a format", remedy=suggestion(options.format, names, "Formats")
        )
    if options.dtype not in (None, *DTYPES):
        raise ConfigError(f"--dtype is {options.dtype}, expected {_DTYPES}")
    vocabulary = Path(options.vocab_file) if options.vocab_file else None
    source = source_of(Path(options.source), vocabulary, merged=options.merged)
    exported = export(
        source,
        FORMATS[options.format],
        dtype=options.dtype,
        output=Path(options.output) if options.output else None,
        force=options.force,
    )
    return Result(_text(exported), dataclasses.asdict(exported))


def _export_adapter(options: argparse.Namespace) -> Result:
    """Write a run's adapter as peft reads it. Raises ConfigError for an option that it does not take."""
    with importing_torch():
        from rwkv_cluster.adapters.peft_folder import write_folder
        from rwkv_cluster.train.checkpoint.export_source import adapter_of
        from rwkv_cluster.train.checkpoint.files import MANIFEST
        from rwkv_cluster.workdir import sha256_file
    for name in ("dtype", "merged", "vocab_file"):
        if getattr(options, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} does not go with --format {options.format}, which is the adapter alone, "
                "in fp32",
                remedy="Leave it out",
            )
    trained, checkpoint = adapter_of(Path(options.source))
    default = checkpoint.path.parent.parent / f"{checkpoint.path.name}-{options.format}"
    exported = write_folder(
        trained,
        options.format,
        Path(options.output) if options.output else default,
        source_sha256=sha256_file(checkpoint.path / MANIFEST),
        force=options.force,
    )
    return Result(_text(exported), dataclasses.asdict(exported))


def _add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="WORK_DIR", help="directory of a run with an adapter")
    parser.add_argument("--output", metavar="PATH", required=True, help="the .pth to write")
    parser.add_argument("--dtype", metavar="DTYPE", help=f"{_DTYPES}; default that of the base")
    parser.add_argument("--force", action="store_true", help="replace another file of that name")


def merge(options: argparse.Namespace) -> Result:
    """Write the base with a run's adapter in it, under RWKV-LM's names. Raises ConfigError for a bad option."""
    return export(argparse.Namespace(**vars(options), format="pth", merged=True, vocab_file=None))


def _text(exported: Exported) -> str:
    state = "already there: " if exported.already_there else ""
    lines = [f"{state}{exported.path}, {exported.n_bytes:,} bytes, {exported.dtype}"]
    lines += [f"sha256 {digest}  {name}" for name, digest in exported.files.items()]
    lines += [f"source sha256 {exported.source_sha256}", *(f"note: {note}" for note in exported.notes)]
    return "\n".join(lines)


EXPORT = Subcommand(
    "export",
    "write weights for other programs: safetensors, Hugging Face folders, Ai00, llama.cpp",
    export,
    _add_export_arguments,
)
MERGE = Subcommand(
    "merge",
    "write one weights file of a base and the adapter that was trained on it",
    merge,
    _add_merge_arguments,
)
