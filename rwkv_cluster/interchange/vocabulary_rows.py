"""Rows of emb and head for the token ids that weights have none for: `training.new_rows`, by which they are made.

V rows, C width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from rwkv_cluster.config import Config
from rwkv_cluster.errors import CheckpointError
from rwkv_cluster.tokenizer import build_tokenizer

NewRows = Literal["mean", "zero"]
NAMES = ("emb.weight", "head.weight")


def with_new_rows(
    weights: Mapping[str, Tensor], n_rows: int, pieces: Mapping[int, Sequence[int]], new_rows: NewRows
) -> dict[str, Tensor]:
    """`weights`, under native names, with `n_rows` rows in emb and head [V,C]; no other value differs.

    New are the rows beyond those that are there, and those of the ids in `pieces`. mean: each is the mean of the rows
    of its pieces, which the token's text was encoded as before it was one token; of all rows that were there where it
    has no pieces. zero: zeros. Means are taken in float64 and rounded once to the dtype of the weights.

    pieces: by id of a new token; ids of rows that are there.
    """
    return {
        name: _grown(tensor, n_rows, pieces, new_rows) if name in NAMES else tensor for name, tensor in weights.items()
    }


def _grown(rows: Tensor, n_rows: int, pieces: Mapping[int, Sequence[int]], new_rows: NewRows) -> Tensor:
    kept = len(rows)
    grown = torch.zeros(n_rows, rows.shape[1], dtype=rows.dtype, device=rows.device)
    grown[:kept] = rows
    if new_rows == "zero":
        grown[list(pieces)] = 0
        return grown
    grown[kept:] = rows.mean(0, dtype=torch.float64).to(rows.dtype)
    for token_id, ids in pieces.items():
        grown[token_id] = (rows[list(ids)] if ids else rows).mean(0, dtype=torch.float64).to(rows.dtype)
    return grown


def fit_rows(weights: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """`weights`, under native names, with the rows of model.vocab_size, made as training.new_rows says.

    As they are where that is not set, or where they have more rows. New tokens are those of data.tokenizer.added_tokens
    that the vocabulary lacks. Raises CheckpointError where it has more ids without them than there are rows.
    """
    new_rows, n_rows = config.training.new_rows, config.model.vocab_size
    matrices = [weights[name] for name in NAMES if name in weights and weights[name].dim() == 2]
    if new_rows is None or n_rows is None or len(matrices) < len(NAMES) or max(map(len, matrices)) > n_rows:
        return dict(weights)  # whoever looks at the model's shape says what is wrong with it
    tokenizer = build_tokenizer(config.data.tokenizer)
    plain_size = int(getattr(tokenizer, "plain_size", tokenizer.vocab_size))
    kept = min(map(len, matrices))
    if plain_size > kept:
        raise CheckpointError(
            f"it has {kept:,} vocabulary rows, and the tokenizer {plain_size:,} ids without added_tokens",
            remedy="Use the tokenizer that the weights were trained with",
        )
    pieces = tokenizer.new_token_pieces() if hasattr(tokenizer, "new_token_pieces") else {}
    return with_new_rows(weights, n_rows, pieces, new_rows)
