"""What Python says of the C interface is what the headers say: constants, structures and functions."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from rwkv_cluster.kernels import build, loader, native, signatures, sizes
from rwkv_cluster.kernels.fused import native as fused

HEADERS = {path.name: path.read_text() for path in sorted(build.CSRC.glob("*.h"))}
CODE = re.sub(r"//[^\n]*", "", "\n".join(HEADERS.values()))
DEFINED = dict(re.findall(r"^#define (RWKV_\w+) +([^\n]*?) *$", CODE, re.MULTILINE))
ENUMERATED = {name: int(value) for name, value in re.findall(r"\b(RWKV_\w+) = (\d+)", CODE)}
STRUCTURES = {name: body for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", CODE, re.DOTALL)}
PROTOTYPES = {
    name: (result, arguments)
    for result, name, arguments in re.findall(r"^([\w ]+?[ *]+)(rwkv_\w+)\(([^)]*)\);", CODE, re.MULTILINE)
}
NAMES_OF_IO = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16"}
NOT_IN_HEADERS = {"rwkv_select_target", "rwkv_host_schedule"}
"""What only tests call."""

C_TYPES = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "const char *": ctypes.c_char_p,
    "void": None,
}
POINTED_TO = {
    "rwkv_problem": signatures.Problem,
    "rwkv_logits": signatures.Logits,
    "rwkv_rows": signatures.Rows,
}
"""Structures that Python has as classes; others are passed as arrays of pointers."""


def c_type(declared: str) -> object:
    """The ctypes type of a result, "int32_t", or of a declared variable without its name, "const void *const *"."""
    declared = declared.strip()
    if declared in C_TYPES:
        return C_TYPES[declared]
    assert declared.endswith("*"), declared
    structure = POINTED_TO.get(declared.removeprefix("const").strip(" *"))
    return ctypes.POINTER(structure) if structure else ctypes.c_void_p


def variables(declarations: str, separator: str) -> list[tuple[str, object]]:
    """Names and types of "int64_t rows, time; void *stream" or "const float *state, void *y"."""
    found: list[tuple[str, object]] = []
    for declaration in filter(None, (" ".join(part.split()) for part in declarations.split(separator))):
        first, *others = declaration.split(", ")
        match = re.fullmatch(r"(.*?)(\w+)", first)
        assert match is not None, first
        kind = match[1].rstrip("* ")
        found.append((match[2], c_type(match[1])))
        found += [(name.strip("*"), c_type(f"{kind} *" if name.startswith("*") else kind)) for name in others]
    return found


def test_constants() -> None:
    assert int(DEFINED["RWKV_KERNELS_ABI"]) == signatures.ABI
    assert int(DEFINED["RWKV_WIDEST_NORM_MIX"]) == sizes.WIDEST_NORM_MIX
    assert int(DEFINED["RWKV_ROWS_IN_BLOCK"]) == fused.ROWS_IN_BLOCK
    assert int(DEFINED["RWKV_MOST_MIXES"]) == max(sizes.NORM_MIX_COUNTS)
    assert ENUMERATED["RWKV_CUDA_ERROR"] == signatures.CUDA_ERROR
    assert {kind: ENUMERATED[f"RWKV_{name}"] for kind, name in NAMES_OF_IO.items()} == native.IO
    kernels = ("RWKV_EXACT", "RWKV_TENSOR_CORES", "RWKV_TENSOR_CORES_16")
    cuda_error_memory_allocation = 2  # of the CUDA runtime
    no_memory = (ENUMERATED["RWKV_NO_MEMORY"], ENUMERATED["RWKV_CUDA_ERROR"] + cuda_error_memory_allocation)
    assert no_memory == signatures.NO_MEMORY
    assert tuple(ENUMERATED[name] for name in kernels) == (native.EXACT, native.TENSOR_CORES, native.TENSOR_CORES_16)
    assert f"L = {sizes.STEPS_BETWEEN_STATES} steps between checkpoints" in HEADERS["wkv.h"]


def test_steps_between_states_are_the_same_everywhere() -> None:
    found = {
        match[1]
        for folder in ("cpu", "cuda")
        for path in (build.CSRC / folder).iterdir()
        for match in re.finditer(r"STEPS_BETWEEN_STATES = (\d+)", path.read_text())
    }
    assert found == {str(sizes.STEPS_BETWEEN_STATES)}


@pytest.mark.parametrize("name", POINTED_TO)
def test_structures(name: str) -> None:
    wanted = variables(STRUCTURES[name], ";")
    in_python = [(field[0], field[1]) for field in POINTED_TO[name]._fields_]
    assert in_python == wanted


@pytest.mark.parametrize("name", sorted(set(STRUCTURES) - set(POINTED_TO)))
def test_structures_that_python_passes_as_arrays_of_pointers(name: str) -> None:
    assert {kind for _, kind in variables(STRUCTURES[name], ";")} == {ctypes.c_void_p}


def test_every_function() -> None:
    in_python = signatures.SIGNATURES | signatures.ONLY_SOME
    assert set(in_python) == set(PROTOTYPES) | NOT_IN_HEADERS
    for name, (result, arguments) in PROTOTYPES.items():
        separated = "" if arguments == "void" else arguments
        wanted = (c_type(result), [kind for _, kind in variables(separated, ",")])
        assert in_python[name] == wanted, name
    assert set(signatures.SIGNATURES) == {name for name in PROTOTYPES if f"{name}(" in HEADERS["wkv.h"]}


def test_numbers_of_mixes() -> None:
    library = loader.cpu()
    assert isinstance(library, loader.Library)
    no_rows = signatures.Rows(rows=0, time=1, width=16, size=16)
    counts = range(int(DEFINED["RWKV_MOST_MIXES"]) + 2)
    nothing = [(ctypes.c_void_p * len(counts))() for _ in range(8)]  # of which no tensor is read
    status = [
        library.handle.rwkv_norm_mix_forward(ctypes.byref(no_rows), count, fused.ROWS_IN_BLOCK, *nothing)
        for count in counts
    ]
    assert tuple(count for count in counts if status[count] == ENUMERATED["RWKV_OK"]) == sizes.NORM_MIX_COUNTS
