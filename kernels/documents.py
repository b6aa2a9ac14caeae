"""Documents that begin from states of their own, in rows of several, for operators that know one state a row.

The operators of `ops` take one state a row, and reset it to zero where a document begins. A document of 300 tokens runs
here as 256, 32, 8 and 4 tokens instead, each from the state after those before: pieces of one length, of all documents,
are the rows of one call. So nothing is padded, rows of T tokens take log2(T) + 1 calls at most, every backend serves as
it is, and gradients reach each document's state by the operator's own.

Legend: B batch, T time, H heads, N head size, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_cluster.kernels import ops


class _Pieces(NamedTuple):
    """Pieces of `length` tokens. documents: int64 [n], the document of each."""

    documents: Tensor
    length: int


class Documents:
    """Documents of rows of T tokens, each with a state of its own before it.

    starts: bool [B,T], true where one begins; the first token of a row begins one too. Looks at the values, so on a GPU
    it waits for them: make one for a batch, not for a layer.

    Attributes:
        starts: as given, with the rows' first tokens.
        first: int64 [D], the first token of each in the flat batch [B * T].
    """

    def __init__(self, starts: Tensor) -> None:
        self.starts = starts.clone()
        self.starts[:, 0] = True
        self.first = self.starts.flatten().nonzero().squeeze(1)
        place = self.first.cpu().clone()
        lengths = torch.diff(place, append=torch.tensor([starts.numel()]))
        order: list[Tensor] = []
        self._pieces: list[_Pieces] = []
        for exponent in reversed(range(int(lengths.max()).bit_length())):
            length = 2**exponent
            chosen = (lengths & length).nonzero().squeeze(1)
            if len(chosen):
                order.append((place[chosen].unsqueeze(1) + torch.arange(length)).flatten())
                place[chosen] += length
                self._pieces.append(_Pieces(chosen.to(starts.device), length))
        self._order = torch.cat(order).to(starts.device)  # [B * T], flat places in the order of the pieces
        self._place = torch.argsort(self._order)

    def __len__(self) -> int:
        return len(self.first)

    def run(
        self, operator: Callable[..., tuple[Tensor, Tensor]], inputs: Sequence[Tensor], states: Tensor, backend: str
    ) -> tuple[Tensor, Tensor]:
        """`operator` of `ops` on each document: y [B,T,H,N], and the state after each [D,H,N,N].

        inputs: its arguments before the state, of [B,T,H,N] or [H,N]. states: [D,H,N,N], before each document.
        """
        backend = ops.resolved(backend, inputs[0])  # for all of them: the time loop has no use for many short rows
        ordered = [_permuted(x.flatten(0, 1), self._order, self._place) if x.ndim == 4 else x for x in inputs]
        outputs: list[Tensor] = []
        place = 0
        for documents, length in self._pieces:
            n_tokens = len(documents) * length
            part = [
                x[place : place + n_tokens].unflatten(0, (-1, length)) if x.ndim == 3 else x for x in ordered
            ]  # [n,length,H,N]
            y, after = operator(*part, states.index_select(0, documents), backend=backend)
            states = states.index_copy(0, documents, after)
            outputs.append(y.flatten(0, 1))
            place += n_tokens
        return _permuted(torch.cat(outputs), self._place, self._order).view_as(inputs[0]), states


class _Permutation(torch.autograd.Function):
    """Rows of x [M,...] in another order. Its gradient is a permutation too, where that of an index adds up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _permuted(grad, inverse, order), None, None


def _permuted(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    permuted: Tensor = _Permutation.apply(x, order, inverse)
    return permuted


Starts = Tensor | Documents
"""Where documents begin: bool [B,T], true where one begins from zero, or documents that have states of their own."""


def flags(starts: Starts | None) -> Tensor | None:
    """Bool [B,T], true where a document begins."""
    return starts.starts if isinstance(starts, Documents) else starts


def run(
    operator: Callable[..., tuple[Tensor, Tensor]],
    inputs: Sequence[Tensor],
    state: Tensor | None,
    starts: Starts | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`operator` of `ops` on rows, or on the documents in them: y [B,T,H,N] and the final states.

    inputs: its arguments before the state. state: before each row [B,H,N,N], or before each document [D,H,N,N].
    """
    if isinstance(starts, Documents):
        assert state is not None
        return starts.run(operator, inputs, state, backend)
    return operator(*inputs, state, starts=starts, backend=backend)
