"""The compiled passes beside their plain forms in float64: results, every gradient, the same bits on any threads."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from fused_passes import (
    LIMITS,
    NATIVE,
    SHAPES,
    SHIFTED,
    arguments,
    errors_of,
    hidden_nans,
    is_bonus,
    results_of,
    run,
    shifted,
    some_starts,
    with_gradients,
)
from naive_wkv import relative_errors

from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import loader
from rwkv_cluster.kernels.fused import native
from rwkv_cluster.kernels.fused import ops as fused

COMPILED = ["mix", "gated_readout"]
COMPILED_LATER = [name for name in NATIVE if name not in COMPILED]


@pytest.fixture(autouse=True)
def _nan_in_uninitialised_memory():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_results_and_every_gradient(name, shape, dtype):
    errors = errors_of(name, shape, dtype)
    assert max(errors) < LIMITS[dtype], errors


@pytest.mark.parametrize(
    ("count", "dtype"), [(3, torch.float32), *product([1, 2, 4, 6], [torch.float32, torch.bfloat16])], ids=str
)
def test_norm_and_mixes_of_documents(count, dtype):
    """Three mixes have no native form of their own."""
    errors = errors_of("norm_mix", (2, 65, 3, 32), dtype, documents=True, count=count)
    assert max(errors) < LIMITS[dtype], errors


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SHIFTED)
def test_the_token_shift_sees_no_other_document(name, shape):
    tensors, parameters = arguments(name, shape)
    first = len(tensors) - parameters
    starts = some_starts(*shape[:2])
    for row in range(shape[0]):
        inner = [step for step in starts[row].nonzero().flatten().tolist() if step]
        lengths = [last - first for first, last in pairwise([0, *inner, shape[1]])]
        rows = [x[row : row + 1] for x in tensors[:first]]
        documents = zip(*(x.split(lengths, 1) for x in rows), strict=True)
        alone = [shifted(name, [*document, *tensors[first:]]) for document in documents]
        together = shifted(name, [*rows, *tensors[first:]], starts=starts[row : row + 1])
        for i, whole in enumerate(together):
            assert torch.equal(whole, torch.cat([document[i] for document in alone], 1))
    given = [x.float() for x in tensors]
    wanted = run(name, [x.double() for x in given], shape[-1], "plain", starts)
    assert max(relative_errors(run(name, given, shape[-1], "native", starts), wanted)) < 2e-6
    assert max(relative_errors(run(name, given, shape[-1], "native"), wanted)) > 0.1 or shape[1] == 1


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_any_number_of_mixes(count):
    tensors, _ = arguments("mix", (2, 9, 1, 32), count)
    given = [x.float() for x in tensors]
    wanted = run("mix", [x.double() for x in given], 32, "plain")
    assert max(relative_errors(run("mix", given, 32, "native"), wanted)) < 2e-6


@pytest.mark.parametrize("name", [name for name in NATIVE if name not in ("squared_relu", "sigmoid_gate")])
def test_parameters_in_the_precision_of_activations(name):
    """As ZeRO has them; and gradients of as many parameters as are trained."""
    tensors, parameters = arguments(name, (2, 9, 2, 32))
    first = len(tensors) - parameters
    given = [x.bfloat16() for x in tensors]
    in_fp32 = [x if i < first and not is_bonus(name, i) else x.float() for i, x in enumerate(given)]
    found, wanted = (run(name, inputs, 32, "native") for inputs in (given, in_fp32))
    assert [x.dtype for x in found[-parameters:]] == [torch.bfloat16] * parameters
    assert all(torch.equal(x, y.to(x.dtype)) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("trained", range(4))
def test_one_parameter_may_be_trained_alone(trained):
    tensors, parameters = arguments("prepare_block_0", (1, 5, 2, 16))
    given = [x.float() for x in tensors]
    wanted = run("prepare_block_0", given, 16, "native")[-parameters:][trained]
    leaf = given[len(given) - parameters + trained].requires_grad_()
    inputs, vectors = given[: len(given) - parameters], given[len(given) - parameters :]
    prepared = fused.prepare(*inputs, None, None, *vectors, None, choice="native")
    generator = torch.Generator().manual_seed(4)
    sent = [torch.randn(x.shape, generator=generator).bfloat16().to(x) for x in prepared]
    reached = [(x, g) for x, g in zip(prepared, sent, strict=True) if x.requires_grad]
    (found,) = torch.autograd.grad([x for x, _ in reached], [leaf], [g for _, g in reached])
    assert torch.equal(found, wanted)


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


@pytest.mark.parametrize("name", NATIVE)
def test_tensors_of_other_dtypes_are_rounded_and_not_misread(name):
    tensors, parameters = arguments(name, (1, 5, 2, 16))
    given = [x.bfloat16() for x in tensors]
    rules = {"sigmoid_gate": 1, "gated_norm": 1, "gated_readout": 3, "prepare": 1, "prepare_block_0": 1}.get(name, 0)
    others = [x.float() if i != rules else x for i, x in enumerate(given)]
    alike = [x if i < len(given) - parameters and not is_bonus(name, i) else x.float() for i, x in enumerate(given)]
    for found, wanted in zip(run(name, others, 16, "native"), run(name, alike, 16, "native"), strict=True):
        assert torch.equal(found.to(wanted.dtype), wanted)


@pytest.mark.parametrize("name", NATIVE)
def test_nothing_hides_a_nan(name):
    assert not hidden_nans(name)


def test_a_vanishing_key_has_finite_gradients():
    tensors, _ = arguments("prepare", (1, 3, 1, 16))
    given = [x.float() for x in tensors]
    given[1][0, 1] = 0.0
    wanted = run("prepare", [x.double() for x in given], 16, "plain")
    found = run("prepare", given, 16, "native")
    assert all(torch.isfinite(x).all() for x in found)
    assert max(relative_errors(found, wanted)) < 2e-6


@pytest.mark.parametrize("name", ["prepare", "prepare_block_0"])
def test_what_later_uses_share_is_not_copied(name):
    """The last block sends no gradient to v_first, and an unused bonus none either."""
    tensors, parameters = arguments(name, (1, 5, 2, 16))
    given = [x.float().requires_grad_() for x in tensors]
    inputs, vectors = given[: len(given) - parameters], given[len(given) - parameters :]
    if name == "prepare_block_0":
        inputs, vectors = [*inputs, None, None], [*vectors, None]
    gradients = []
    for choice in ("native", "plain"):
        prepared = fused.prepare(*inputs, *vectors, choice=choice)
        memory = {field: x.data_ptr() for field, x in prepared._asdict().items()}
        assert (memory["r"], memory["v_again"]) == (inputs[0].data_ptr(), memory["v"])
        assert memory["v_first"] == inputs[3 if name == "prepare_block_0" else 4].data_ptr()
        loss = (prepared.v * prepared.k).sum() + (prepared.r * prepared.replaced * prepared.removed).sum()
        gradients.append(torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True))
    for found, wanted in zip(*gradients, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.system
@pytest.mark.parametrize(
    "name", [name if name in COMPILED else pytest.param(name, marks=pytest.mark.slow) for name in NATIVE]
)
def test_under_torch_compile(name):
    """Inductor's C++ for the CPU stands in for its Triton code; bf16 beside float64 as above."""
    tensors, parameters = arguments(name, (2, 9, 2, 32))
    first = len(tensors) - parameters
    given = [
        x.bfloat16() if i < first and not is_bonus(name, i) else x.bfloat16().float() for i, x in enumerate(tensors)
    ]
    found = run(name, given, 32, "compile")
    assert all(x.dtype == g.dtype for x, g in zip(found[-len(given) :], given, strict=True))
    wanted = run(name, [x.double() for x in given], 32, "plain")
    limit = 8e-3  # the plain form rounds in between, and the compiled one may
    assert max(relative_errors(found, wanted)) < limit, relative_errors(found, wanted)
    if name in SHIFTED:
        starts = some_starts(2, 9)
        wanted = run(name, [x.double() for x in given], 32, "plain", starts)
        assert max(relative_errors(run(name, given, 32, "compile", starts), wanted)) < limit


def test_in_a_graph_of_torch_compile():
    """All passes in one graph, as in a model that its user compiles whole: there they take the plain form."""
    starts = some_starts(2, 9)
    given = {name: [x.float() for x in arguments(name, (2, 9, 2, 32))[0]] for name in NATIVE}
    leaves = {name: [x.requires_grad_() for x in tensors] for name, tensors in given.items()}

    def block(leaves):
        return {name: results_of(name, x, "auto", starts) for name, x in leaves.items()}

    results = torch.compile(block, fullgraph=True, backend="eager")(leaves)
    for name in NATIVE:
        wanted = run(name, [x.detach().double() for x in leaves[name]], 32, "plain", starts)
        assert max(relative_errors(with_gradients(results[name], leaves[name]), wanted)) < LIMITS[torch.float32], name


def test_what_the_native_form_does_not_take_goes_the_plain_way(monkeypatch):
    tensors, _ = arguments("mix", (1, 5, 1, 12))
    given = [x.float() for x in tensors]
    assert not native.serves(given[0], 12)
    assert all(map(torch.equal, run("mix", given, 12, "native"), run("mix", given, 12, "plain")))
    monkeypatch.setattr(loader, "cpu", lambda: loader.Missing("Nothing here"))
    assert not native.serves(torch.zeros(1, 2, 16), 16)


def test_a_choice_that_cannot_be_had_is_refused(monkeypatch):
    monkeypatch.setattr(fused, "find_library", lambda device: loader.Missing(f"Nothing for {device}"))
    for device_type in ("cpu", "cuda"):
        with pytest.raises(KernelError, match=rf'^Nothing for {device_type}\. training\.fused "native" needs them'):
            fused.require("native", device_type)
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
    not_of_native = 24
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 2, not_of_native))
    assert fused._form("auto", on_gpu) == "compile"
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
        assert fused._form("auto", on_gpu) == "plain"
    (record,) = caplog.records
    assert f"torch.compile needs {named}" in record.getMessage()
    with pytest.raises(KernelError, match=f'"compile" needs {named}'):
        fused.require("compile", "cuda")


@pytest.mark.usefixtures("triton_is_here")
@pytest.mark.parametrize("choice", ["auto", "native"])
def test_on_a_gpu_the_cuda_library_is_taken_where_it_serves(choice, monkeypatch):
    library = loader.Library(SimpleNamespace(), Path("libwkv_cuda.so"), "sm_90")
    monkeypatch.setattr(native, "find_library", lambda device: {"cuda": library}[device.type])

    def form(width: int, size: int | None = None, dtype: torch.dtype = torch.bfloat16) -> str:
        on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 2, width))
        return fused._form(choice, on_gpu, size)

    sizes = (16, 32, 64, 128, 256)
    otherwise = "compile" if choice == "auto" else "plain"
    assert {form(768), *(form(1024, size) for size in sizes)} == {"native"}
    assert {form(776), form(960, 48), form(1024, 512), form(768, dtype=torch.float64)} == {otherwise}
    with torch.no_grad():  # in sampling too, where nothing is compiled
        assert (form(768, 64), form(776)) == ("native", "plain")
    monkeypatch.setattr(native, "find_library", lambda device: loader.Missing("Nothing here"))
    assert form(768, 64) == otherwise


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
