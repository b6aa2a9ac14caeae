"""RWKV-LM's weights file: a zip-format torch file that holds one flat dict of tensors, and nothing else.

`load_pth` trusts no byte of it: every record's CRC is checked (torch.load alone accepts a flipped bit in
silence), pickled code is refused, and what comes out is a dict of floating-point tensors. `save_pth` writes
atomically, and the same tensors give the same bytes.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from rwkv_cluster.config import ModelConfig
from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.model.init import initial_value
from rwkv_cluster.model.parameter_shapes import unused_names
from rwkv_cluster.model.recognise import archive_fault, content_fault, names_fault, require_weights_file
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.versions.table import VERSIONS
from rwkv_cluster.model.versions.version import Shapes, Version
from rwkv_cluster.runtime.disk_errors import writing
from rwkv_cluster.runtime.terminal.time_left import bytes_left
from rwkv_cluster.workdir import atomic_writer

WRAPPER_PREFIXES = ("_forward_module.", "model.", "module.")
WRAPPER_PARTS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
LISTED_DIFFERENCES = 8
TENSOR_BUILDERS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)|torch\.\w+Storage"
)


def save_pth(path: Path, state_dict: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Write `state_dict` to `path` in RWKV-LM's format, atomically, in `dtype` (None: as they are).

    Raises:
        CheckpointError: a tensor has a NaN or infinite value, or the file cannot be written.
    """
    check_finite(state_dict, f"{path}: not written")
    # a copy of its own for every tensor: torch.save would store the whole buffer behind a view
    flat = {
        name: torch.empty(tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor.detach())
        for name, tensor in state_dict.items()
    }
    with writing(path, sum(tensor.nbytes for tensor in flat.values())), atomic_writer(path) as handle:
        torch.save(flat, handle)


def load_pth(path: Path, *, mapped: bool = False, codes: bool = False) -> dict[str, Tensor]:
    """Read a weights file into tensors on the CPU, in the dtypes of the file, in the order of the file.

    mapped: leave the tensors in the file, from which the system reads what is used of them. codes: let tensors of
    uint8 be among them, as moments in 8 bits are.

    Raises:
        MissingCheckpointError: no such file.
        CheckpointError: damaged, truncated, in the format before torch 1.6, with anything but tensors
            in it, or with pickled code.
    """
    path = Path(path)
    require_weights_file(path)
    _check_archive(path)
    return _load(path, mapped, codes=codes)


def peek_pth(path: Path) -> dict[str, Tensor]:
    """Tensors of a weights file without a look at their values: those are mapped, without a checksum.

    Costs milliseconds for any size. Raises MissingCheckpointError, CheckpointError as `load_pth`.
    """
    require_weights_file(path)
    _check_archive(path, checksums=False)
    return _load(path, mapped=True)


def _load(path: Path, mapped: bool, *, codes: bool = False) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # hostile bytes make the unpickler raise anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        # no more of torch's text than a name: it advises to switch the protection off
        reason = f"it names {named[1]}" if named else f"torch.load ends with {type(error).__name__}"
        raise CheckpointError(f"{path}: refused: it is not a flat dict of tensors ({reason})") from error
    return _tensors_only(path, content, codes=codes)


def infer_model_config(state_dict: Mapping[str, Tensor]) -> ModelConfig:
    """Architecture, widths and LoRA ranks of the weights. `ctx_len` is not in them and keeps its default.

    Raises:
        CheckpointError: not the weights of RWKV-5.2, RWKV-6 or RWKV-7.
    """
    tensors = strip_prefixes(state_dict)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    version = _recognised(shapes)
    try:
        vocab_size, n_embd = shapes["emb.weight"]
        per_head = shapes[f"blocks.0.att.{version.per_head}"]  # [H,N]
        fields = {
            "model_type": version.name,
            "n_layer": _n_layer(shapes),
            "n_embd": n_embd,
            "vocab_size": vocab_size,
            "dim_att": shapes["blocks.0.att.receptance.weight"][0],
            "dim_ffn": shapes["blocks.0.ffn.key.weight"][0],
            "head_size_a": per_head[1],
            **version.ranks_of(shapes),
        }
        return ModelConfig(**fields)
    except KeyError as error:
        raise CheckpointError(f"weights look like {version.name} but have no tensor {error}") from error
    except (IndexError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise CheckpointError(f"weights look like {version.name} but their shapes do not: {reason}") from error


def fit_state_dict(state_dict: Mapping[str, Tensor], model: RWKV) -> dict[str, Tensor]:
    """Tensors as `model.load_state_dict` takes them: names without wrapper prefixes, in the dtypes that they have.

    It casts each one as it copies it, so that no second copy of the weights is in memory.

    Tensors of block 0 that no computation uses (v0, v1, v2 of RWKV-7) are dropped, or filled with initial values, as
    the model has them or not.

    Raises:
        CheckpointError: names or shapes differ, all listed; or a value is not finite.
    """
    tensors = strip_prefixes(state_dict)
    expected = model.state_dict()
    for name in unused_names():
        if name in expected and name not in tensors:
            tensors[name] = initial_value(model.config, name, expected[name].shape, seed=0)
        elif name not in expected:
            tensors.pop(name, None)
    differences = _differences(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
    )
    if differences:
        first_ones = "; ".join(differences[:LISTED_DIFFERENCES])
        left_out = len(differences) - LISTED_DIFFERENCES
        more = f"; and {left_out} more" if left_out > 0 else ""
        raise CheckpointError(
            f"weights do not fit the configured model: {first_ones}{more}", remedy="Set model.* to the weights' shape"
        )
    with bytes_left("reading weights", sum(tensor.nbytes for tensor in tensors.values())) as left:
        check_finite(tensors, "weights are not usable", left.advance)
    return {name: tensors[name] for name in expected}


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a weights file of `config`, in the model's order. Allocates none."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in RWKV(config).state_dict().items()}


def strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what Lightning, DeepSpeed, DDP, FSDP and torch.compile put before and into them.

    Raises CheckpointError where two tensors then have one name, or where they are no model's weights alone.
    """
    stripped: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        bare = WRAPPER_PARTS.sub("", name)
        while bare.startswith(WRAPPER_PREFIXES):
            bare = bare.split(".", 1)[1]
        if bare in stripped:
            raise CheckpointError(
                f"weights have {bare!r:.80} twice, once with a wrapper's prefix", remedy="Keep one of the two"
            )
        stripped[bare] = tensor
    if fault := names_fault(stripped):
        raise CheckpointError(f"weights cannot be used: {fault}")
    return stripped


def check_finite(
    state_dict: Mapping[str, Tensor], what: str, advance: Callable[[int], None] = lambda n_bytes: None
) -> None:
    """Raise CheckpointError, beginning with `what`, when any tensor has a NaN or infinite value.

    advance: told of the bytes of each tensor that is done.
    """
    for name, tensor in state_dict.items():
        # the sum settles almost every tensor in one pass; a finite one may overflow it, so look closely then
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
            raise CheckpointError(f"{what}: {name} has a NaN or infinite value", remedy="Use an earlier checkpoint")
        advance(tensor.nbytes)


def _check_archive(path: Path, *, checksums: bool = True) -> None:
    """Raise CheckpointError unless every record of the zip file is whole and its pickle builds tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            if fault := archive_fault(archive):
                raise CheckpointError(f"{path}: {fault}")
            records = archive.infolist()
            if len({record.filename for record in records}) < len(records):
                raise CheckpointError(f"{path}: refused: two records of the archive have the same name")
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise CheckpointError(f"{path}: refused: it is compressed, which torch.save never does")
            bad = _damaged_record(archive, path) if checksums else None
            pickles = [record for record in records if record.filename.endswith("/data.pkl")]
            if bad is None and len(pickles) == 1:
                _check_pickle(path, archive.read(pickles[0]))
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged headers make zipfile raise anything
        raise CheckpointError(f"{path}: damaged or truncated: {error}", remedy="Use another copy") from error
    if bad is not None:
        raise CheckpointError(f"{path}: damaged: record {bad} fails its checksum", remedy="Use another copy")


def _damaged_record(archive: zipfile.ZipFile, path: Path) -> str | None:
    """Name of the first record whose bytes do not have its checksum."""
    with bytes_left(f"reading {path.name}", sum(record.file_size for record in archive.infolist())) as left:
        for record in archive.infolist():
            try:
                with archive.open(record) as content:
                    while block := content.read(1 << 20):
                        left.advance(len(block))
            except zipfile.BadZipFile:
                return record.filename
    return None


def _check_pickle(path: Path, pickled: bytes) -> None:
    """Raise CheckpointError for a pickle that names more than tensors need; torch.load's list is the second wall."""
    strings: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickled):
        if isinstance(argument, str) and opcode.name not in ("GLOBAL", "INST"):
            strings.append(argument)
            continue
        if opcode.name in ("GLOBAL", "INST"):
            name = str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            name = ".".join(strings[-2:])
        else:
            continue
        if name.startswith("torch._utils._rebuild_q"):
            raise CheckpointError(
                f"{path}: its tensors are quantised", remedy="Use the weights that they were made from"
            )
        if not TENSOR_BUILDERS.fullmatch(name):
            raise CheckpointError(
                f"{path}: refused: it names the Python object {name!r:.80}, where only dense tensors may be. "
                "Nothing of it was run",
                remedy="Save the tensors alone: torch.save(model.state_dict(), path)",
            )


def _tensors_only(path: Path, content: object, *, codes: bool) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a flat dict of tensors")
    if fault := content_fault(content):
        raise CheckpointError(f"{path}: {fault}")
    file_bytes = path.stat().st_size
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: has the key {name!r:.60}, expected a tensor's name")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name!r:.80} is a {type(value).__name__}, expected a tensor")
        is_code = codes and value.dtype == torch.uint8
        if value.dtype in (torch.int8, torch.uint8) and not is_code:
            raise CheckpointError(
                f"{path}: {name!r:.80} is quantised to {value.dtype}", remedy="Use weights in bf16, fp16 or fp32"
            )
        if not (value.is_floating_point() or is_code) or value.layout != torch.strided:
            raise CheckpointError(f"{path}: {name!r:.80} has dtype {value.dtype}, expected dense floats")
        if value.numel() * value.element_size() > file_bytes:
            raise CheckpointError(f"{path}: {name!r:.80} claims more values than the file has bytes")
        tensors[name] = value.detach()
    return tensors


def _recognised(shapes: Shapes) -> Version:
    """The newest version whose weights look so. Raises CheckpointError where there is none."""
    for version in reversed(VERSIONS.values()):
        if version.recognises(shapes):
            return version
    if "emb.weight" not in shapes or "blocks.0.att.time_decay" not in shapes:
        names = ", ".join(list(shapes)[:3]) or "no tensors at all"
        raise CheckpointError(f"weights are not those of an RWKV: found {names}, expected emb.weight, blocks.0.*")
    oldest = next(iter(VERSIONS.values()))
    *others, newest = (f"{version.title} ({version.name})" for version in VERSIONS.values())
    raise CheckpointError(
        f"weights are those of an RWKV before {oldest.title}", remedy=f"Supported: {', '.join(others)} and {newest}"
    )


def _n_layer(shapes: Shapes) -> int:
    layers = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d{1,6})\.", name))}
    if layers != set(range(len(layers))):
        missing = min(set(range(len(layers))) - layers)
        raise CheckpointError(f"weights have blocks up to {max(layers)} but no block {missing}")
    return len(layers)


def _differences(actual: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    missing = [f"{name} is missing" for name in expected if name not in actual]
    unknown = [f"{name} is not part of the model" for name in actual if name not in expected]
    shapes = [
        f"{name} is {actual[name]}, the model has {expected[name]}"
        for name in expected
        if name in actual and actual[name] != expected[name]
    ]
    return shapes + missing + unknown
