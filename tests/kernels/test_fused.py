"""The compiled passes beside their plain forms in float64: results, every gradient, the same bits on any threads."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from naive_wkv import relative_errors

from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import loader
from rwkv_cluster.kernels.fused import cpu as fused_cpu
from rwkv_cluster.kernels.fused import ops as fused

NATIVE = ["mix", "squared_relu", "prepare_keys", "gated_readout"]
COMPILED, COMPILED_LATER = ["mix", "gated_readout"], ["squared_relu", "prepare_keys", "blend", "gated_norm"]
SHAPES = [(2, 1, 4, 16), (2, 7, 3, 16), (3, 50, 2, 64), (2, 65, 1, 32)]  # B, T, H, N


def arguments(name: str, shape: tuple[int, int, int, int], count: int = 6) -> tuple[list[torch.Tensor], int]:
    """float64 tensors of an operator, its parameters last, and the number of those."""
    batch, time, heads, size = shape
    generator = torch.Generator().manual_seed(3)

    def normal(*dims: int) -> torch.Tensor:
        return torch.randn(dims, generator=generator, dtype=torch.float64)

    flat, full, width = (batch, time, heads * size), shape, heads * size
    if name == "mix":
        return [normal(*flat), *(normal(1, 1, width) for _ in range(count))], count
    if name == "blend":
        return [normal(*flat), normal(*flat), *(normal(*flat) for _ in range(5))], 0
    if name == "squared_relu":
        return [normal(*flat)], 0
    if name == "gated_norm":
        return [normal(*full), normal(*flat), normal(width), normal(width)], 2
    if name == "prepare_keys":
        return [normal(*flat), torch.sigmoid(normal(*flat)), normal(1, 1, width), normal(1, 1, width)], 2
    parameters = [normal(heads, size), normal(width), normal(width)]
    return [*(normal(*full) for _ in range(4)), normal(*flat), *parameters], 3


def some_starts(batch: int, time: int) -> torch.Tensor:
    """Documents of a block of 64 rows: of 3 tokens, of one, and from its first row and its last."""
    in_block = torch.arange(batch * time).view(batch, time) % 64
    return (in_block % 3 == 0) | (in_block == 1)


def run(
    name: str, given: list[torch.Tensor], size: int, choice: str, starts: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Results and the gradients of everything."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    if name == "mix":
        results = list(fused.mix(leaves[0], leaves[1:], starts, choice=choice))
    elif name == "blend":
        results = list(fused.blend(leaves[0], leaves[1], leaves[2:], choice=choice))
    elif name == "prepare_keys":
        results = list(fused.prepare_keys(*leaves, size, choice=choice))
    else:
        results = [getattr(fused, name)(*leaves, choice=choice)]
    generator = torch.Generator().manual_seed(4)
    sent = [torch.randn(x.shape, generator=generator).bfloat16().to(x.dtype) for x in results]
    return [*(x.detach() for x in results), *torch.autograd.grad(results, leaves, sent)]


@pytest.fixture(autouse=True)
def _nan_in_uninitialised_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_results_and_every_gradient(name, shape, dtype):
    tensors, parameters = arguments(name, shape)
    first = len(tensors) - parameters
    rounded = [x.to(dtype) for x in tensors]  # parameters too: they are used in the dtype of the activations
    given = [x if i < first else x.float() for i, x in enumerate(rounded)]
    found = run(name, given, shape[-1], "native")
    wanted = run(name, [x.double() for x in given], shape[-1], "plain")
    limit = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    assert max(relative_errors(found, wanted)) < limit, relative_errors(found, wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_token_shift_sees_no_other_document(shape):
    tensors, _ = arguments("mix", shape)
    x, mixes = tensors[0], tensors[1:]
    starts = some_starts(*shape[:2])
    for row in range(shape[0]):
        inner = [step for step in starts[row].nonzero().flatten().tolist() if step]
        lengths = [last - first for first, last in pairwise([0, *inner, shape[1]])]
        alone = [fused.mix(document, mixes) for document in x[row : row + 1].split(lengths, 1)]
        together = fused.mix(x[row : row + 1], mixes, starts[row : row + 1])
        for i, whole in enumerate(together):
            assert torch.equal(whole, torch.cat([document[i] for document in alone], 1))
    given = [x.float() for x in tensors]
    wanted = run("mix", [x.double() for x in given], shape[-1], "plain", starts)
    assert max(relative_errors(run("mix", given, shape[-1], "native", starts), wanted)) < 2e-6
    assert max(relative_errors(run("mix", given, shape[-1], "native"), wanted)) > 0.1 or shape[1] == 1


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_any_number_of_mixes(count):
    tensors, _ = arguments("mix", (2, 9, 1, 32), count)
    given = [x.float() for x in tensors]
    wanted = run("mix", [x.double() for x in given], 32, "plain")
    assert max(relative_errors(run("mix", given, 32, "native"), wanted)) < 2e-6


@pytest.mark.parametrize("name", NATIVE)
def test_any_number_of_threads_gives_the_same_bits(name):
    tensors, _ = arguments(name, (3, 100, 2, 32))
    given = [x.float() for x in tensors]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(run(name, given, 32, "native"))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("target", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("name", NATIVE)
def test_every_instruction_set(name, target):
    library = loader.cpu()
    assert isinstance(library, loader.Library)
    if library.handle.rwkv_select_target(target.encode()):
        pytest.skip(f"this processor has no {target}")
    try:
        tensors, _ = arguments(name, (2, 20, 2, 32))
        given = [x.float() for x in tensors]
        wanted = run(name, [x.double() for x in given], 32, "plain")
        assert max(relative_errors(run(name, given, 32, "native"), wanted)) < 2e-6
    finally:
        library.handle.rwkv_select_target(library.target.encode())


def test_a_vanishing_key_has_finite_gradients():
    tensors, _ = arguments("prepare_keys", (1, 3, 1, 16))
    given = [x.float() for x in tensors]
    given[0][0, 1] = 0.0
    wanted = run("prepare_keys", [x.double() for x in given], 16, "plain")
    found = run("prepare_keys", given, 16, "native")
    assert all(torch.isfinite(x).all() for x in found)
    assert max(relative_errors(found, wanted)) < 2e-6


@pytest.mark.system
@pytest.mark.parametrize("name", [*COMPILED, *(pytest.param(name, marks=pytest.mark.slow) for name in COMPILED_LATER)])
def test_under_torch_compile(name):
    """Inductor's C++ for the CPU stands in for its Triton code; bf16 beside float64 as above."""
    tensors, parameters = arguments(name, (2, 9, 2, 32))
    first = len(tensors) - parameters
    given = [x.bfloat16() if i < first else x.bfloat16().float() for i, x in enumerate(tensors)]
    found = run(name, given, 32, "compile")
    assert all(x.dtype == g.dtype for x, g in zip(found[-len(given) :], given, strict=True))
    wanted = run(name, [x.double() for x in given], 32, "plain")
    limit = 8e-3  # the plain form rounds in between, and the compiled one may
    assert max(relative_errors(found, wanted)) < limit, relative_errors(found, wanted)
    if name == "mix":
        starts = some_starts(2, 9)
        wanted = run(name, [x.double() for x in given], 32, "plain", starts)
        assert max(relative_errors(run(name, given, 32, "compile", starts), wanted)) < limit


def test_what_the_native_form_does_not_take_goes_the_plain_way(monkeypatch):
    tensors, _ = arguments("mix", (1, 5, 1, 12))
    given = [x.float() for x in tensors]
    assert not fused_cpu.serves(given[0], 12)
    assert all(map(torch.equal, run("mix", given, 12, "native"), run("mix", given, 12, "plain")))
    monkeypatch.setattr(loader, "cpu", lambda: loader.Missing("Nothing here"))
    assert not fused_cpu.serves(torch.zeros(1, 2, 16), 16)


def test_a_choice_that_cannot_be_had_is_refused(monkeypatch):
    with pytest.raises(KernelError, match=r'^training\.fused "native" is for CPUs'):
        fused.require("native", "cuda")
    monkeypatch.setattr(loader, "cpu", lambda: loader.Missing("Nothing here"))
    with pytest.raises(KernelError, match=r'^Nothing here\. training\.fused "native" needs them'):
        fused.require("native", "cpu")
    monkeypatch.setattr(fused, "missing_for_compile", lambda device_type: "Triton")
    with pytest.raises(KernelError, match=r'^training\.fused "compile" needs Triton'):
        fused.require("compile", "cuda")
    for choice in ("auto", "plain"):
        fused.require(choice, "cuda")


@pytest.fixture
def triton_is_here(monkeypatch, tmp_path):
    """As on a machine with Triton, a C compiler and Python's headers."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: True if name == "triton" else find(name, *a))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "gcc" else None)
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    fused.missing_for_compile.cache_clear()
    fused._tell.cache_clear()
    yield
    fused.missing_for_compile.cache_clear()
    fused._tell.cache_clear()


@pytest.mark.usefixtures("triton_is_here")
@pytest.mark.parametrize(
    ("missing", "named"),
    [("triton", "Triton"), ("gcc", "a C compiler"), ("CC", "a C compiler"), ("Python.h", "Python.h")],
)
def test_on_a_gpu_auto_compiles_only_where_triton_can_and_says_once_why_not(
    missing, named, monkeypatch, caplog, tmp_path
):
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    assert fused._form("auto", on_gpu, 64) == "compile"
    assert not caplog.records
    fused.missing_for_compile.cache_clear()
    if missing == "triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif missing == "gcc":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    elif missing == "CC":
        monkeypatch.setenv("CC", "no-such-compiler")
    else:
        (tmp_path / "Python.h").unlink()
    for _ in range(2):
        assert fused._form("auto", on_gpu, 64) == "plain"
    (record,) = caplog.records
    assert f"torch.compile needs {named}" in record.getMessage()
    with pytest.raises(KernelError, match=f'"compile" needs {named}'):
        fused.require("compile", "cuda")


def test_one_process_may_meet_more_variants_than_torch_compile_allows_by_itself(monkeypatch):
    """Models of many widths, precisions and versions; parameters have static shapes, so each is a variant."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled(function, fullgraph=True, backend="eager"))
    fused._compiled.cache_clear()
    torch._dynamo.config.recompile_limit = 2
    try:
        for width in range(16, 16 * 5, 16):
            x, mix = torch.randn(1, 3, width), torch.nn.Parameter(torch.randn(1, 1, width))
            (found,) = fused.mix(x, [mix], choice="compile")
            assert torch.equal(found, fused.mix(x, [mix], choice="plain")[0])
        torch._dynamo.config.recompile_limit = 1000
        fused._compiled.cache_clear()
        fused.mix(x, [mix], choice="compile")
        assert torch._dynamo.config.recompile_limit == 1000
    finally:
        torch._dynamo.reset()
        fused._compiled.cache_clear()
        torch._dynamo.config.recompile_limit = 8


def test_the_compiler_makes_no_choice_by_measuring(monkeypatch):
    given = {}
    monkeypatch.setattr(torch, "compile", lambda function, **options: given.update(options) or function)
    fused._compiled.cache_clear()
    fused.squared_relu(torch.zeros(1, 2, 16), choice="compile")
    fused._compiled.cache_clear()
    if not hasattr(torch._inductor.config, "deterministic"):
        pytest.skip("this torch has no switch for it")
    assert given["options"] == {"deterministic": True}
