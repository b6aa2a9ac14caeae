"""An adapter from a folder as peft has it: one of ours, of RWKV-PEFT, or trained on an exported folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rwkv_cluster.adapters.base import fingerprint
from rwkv_cluster.adapters.peft_folder import BASE, CONFIG, LAYOUTS_BY_FORMAT, PREFIX, TENSORS
from rwkv_cluster.adapters.table import KINDS, is_adapter_part
from rwkv_cluster.errors import CheckpointError, MissingCheckpointError
from rwkv_cluster.interchange.read import read_tensors
from rwkv_cluster.model.rwkv import RWKV
from rwkv_cluster.model.weights_file import check_finite, strip_prefixes

_CHANGE_THE_MEANING = ("rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out")
"""Settings of peft with which the tensors mean something else."""
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Values of init_lora_weights that leave a base of their own, which the folder does not have."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Parts = dict[str, Tensor]


@torch.no_grad()
def merge_folder(model: RWKV, folder: Path, base: Mapping[str, Tensor] | None = None) -> None:
    """Put the adapter of a folder into the weights of `model`, computed in fp32, one matrix at a time.

    base: the tensors that the model was made of, where it has them in another precision.

    Raises MissingCheckpointError where there is none, CheckpointError where it is damaged, of a kind that is not known,
    or of other weights.
    """
    kind, scale = _settings(folder)
    by_weight = _by_weight(folder, model)
    _require_base(folder, model.state_dict() if base is None else strip_prefixes(base))
    row = KINDS[kind]
    for name, parts in by_weight.items():
        weight = model.get_parameter(name)
        shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
        n_out, n_in = weight.shape
        expected = row.trained(n_out, n_in, next(iter(shapes.values()))[0])
        if shapes != expected:
            raise CheckpointError(f"{folder}: the adapter of {name} is {shapes}, expected {dict(expected)}")
        on_device = {part: tensor.to(weight.device) for part, tensor in parts.items()}
        accurate = weight.to(torch.promote_types(weight.dtype, torch.float32))
        weight.copy_(row.functions().merged(accurate, on_device, scale))


def _settings(folder: Path) -> tuple[str, float]:
    """Kind and scale as adapter_config.json has them."""
    path = folder / CONFIG
    try:
        config: Any = json.loads(path.read_text())
        peft_type, initial = config["peft_type"], str(config.get("init_lora_weights"))
        kinds = {"LORA": "dora" if config.get("use_dora") else "lora", "MISS": "miss"}
        scale = config["lora_alpha"] / config["r"] if peft_type == "LORA" else 1.0
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingCheckpointError(
            f"{folder} has no {CONFIG}, so it is no adapter", remedy="Name a folder as peft has it"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: it is no configuration of an adapter: {error!r}") from error
    if peft_type not in kinds:
        raise CheckpointError(f"{path}: peft_type is {peft_type}, expected one of: {', '.join(kinds)}")
    if changed := [name for name in _CHANGE_THE_MEANING if config.get(name)]:
        raise CheckpointError(f"{path}: {changed[0]} is set, and adapters with it are not read")
    if initial.startswith(_CHANGE_THE_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights is {initial}, and such an adapter belongs to weights that peft has changed",
            remedy="Save it with path_initial_model_for_weight_conversion, as peft's documentation says",
        )
    return kinds[peft_type], scale


def _by_weight(folder: Path, model: RWKV) -> dict[str, Parts]:
    """Parts in fp32 by the native name of their matrix. Raises CheckpointError for a tensor of anything else."""
    tensors = read_tensors(folder / TENSORS)
    check_finite(tensors, f"{folder / TENSORS}: the adapter is not usable")
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim == 2}
    by_weight: dict[str, Parts] = {}
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        weight = _native(f"{module}.weight")
        if weight not in matrices or not is_adapter_part(part):
            raise CheckpointError(
                f"{folder / TENSORS}: {name!r:.120} is no part of an adapter of this model",
                remedy="Name the weights that it was trained on",
            )
        by_weight.setdefault(weight, {})[part] = tensor.float()
    return by_weight


def _native(name: str) -> str:
    """The native name of a weight under native names, or those of an exported folder."""
    for layout in filter(None, LAYOUTS_BY_FORMAT.values()):
        with contextlib.suppress(KeyError):
            return layout.to_native(name)[0]
    return name


def _require_base(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where the folder says which weights it belongs to, and `weights` are others.

    Those are in the precision of the run that trained it, which the folder does not say.
    """
    with safe_open(folder / TENSORS, "pt") as file:
        expected = (file.metadata() or {}).get(BASE)
    if expected is None:
        return
    for dtype in _DTYPES:
        found = fingerprint(weights, dtype)
        if found == expected:
            return
    raise CheckpointError(
        f"{folder}: the adapter was trained on other weights: fingerprint {expected}, these have {found} in fp32",
        remedy="Name the weights that it was trained on",
    )
