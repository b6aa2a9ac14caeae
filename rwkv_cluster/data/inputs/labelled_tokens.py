"""Rows of token ids with what is trained on: labels as in transformers, or a mask.

`input_ids` or `tokens` hold the ids. `labels` repeat them, with -100 where a token is not trained on; they are not
shifted. `mask` or `loss_mask` have 1 or 0 in their place. Where `attention_mask` is 0 there is padding, which is left
out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rwkv_cluster.data.inputs.bad_lines import BadLine
from rwkv_cluster.data.inputs.readers import field_names, kind_name, require_integers

NOT_TRAINED = -100
_IDS = ("input_ids", "tokens")
_MARKS = ("labels", "mask", "loss_mask")


def is_labelled(record: dict[str, Any]) -> bool:
    """Whether a row has ids and what is trained on."""
    return _first(record, _IDS) is not None and _first(record, _MARKS) is not None


def read_labelled(record: dict[str, Any]) -> tuple[list[int], np.ndarray]:
    """Ids [n] of a row and which of them are trained on, [n] bool. Raises BadLine, also where none is."""
    id_field, mark_field = _first(record, _IDS), _first(record, _MARKS)
    if id_field is None or mark_field is None:
        raise BadLine(f'has no "input_ids" with "labels", and no "tokens" with "mask" (it has {field_names(record)})')
    present = [field for field in (id_field, mark_field, "attention_mask") if field in record]
    for field in present:
        if type(record[field]) is not list:
            raise BadLine(f'"{field}" is {kind_name(record[field])}, expected a list of integers')
        require_integers(record[field], field)
        if len(record[field]) != len(record[id_field]):
            raise BadLine(
                f'"{field}" has {len(record[field]):,} values, and "{id_field}" has {len(record[id_field]):,}'
            )
    ids, marks = record[id_field], record[mark_field]
    if 0 in (attention := record.get("attention_mask", ())):
        kept = [index for index, seen in enumerate(attention) if seen]
        ids, marks = [ids[index] for index in kept], [marks[index] for index in kept]
    trained = _from_labels(ids, marks) if mark_field == "labels" else _from_mask(marks, mark_field)
    if ids and not any(trained):
        raise BadLine(
            f'has no token to train on: "{mark_field}" is {NOT_TRAINED if mark_field == "labels" else 0} in every place'
        )
    return ids, np.array(trained, bool)


def _first(record: dict[str, Any], fields: tuple[str, ...]) -> str | None:
    return next((field for field in fields if field in record), None)


def _from_labels(ids: list[int], labels: list[int]) -> list[bool]:
    trained = [label != NOT_TRAINED for label in labels]
    for index, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (NOT_TRAINED, token):
            raise BadLine(
                f'"labels" has {label} at index {index} where the id is {token}, expected the same or {NOT_TRAINED}: '
                "labels are not shifted"
            )
    return trained


def _from_mask(mask: list[int], field: str) -> list[bool]:
    if bad := next((value for value in mask if value not in (0, 1)), None):
        raise BadLine(f'"{field}" has {bad}, expected 0 or 1')
    return [value == 1 for value in mask]
