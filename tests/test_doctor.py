"""`rwkv-cluster doctor`: every row has its reason, and a kernel that computes something wrong is not passed over."""

from __future__ import annotations

import json

import pytest
import torch

from rwkv_cluster import doctor
from rwkv_cluster.cli import main
from rwkv_cluster.errors import KernelError
from rwkv_cluster.kernels import loader, self_test


def rows() -> dict[str, doctor.Row]:
    return {row.what: row for row in doctor.examine()}


def test_what_is_here_is_found_and_passes_its_test(capsys):
    assert main(["doctor", "--json"]) == 0
    found = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["WKV kernels, CPU"]["works"] is True
    for backend in ("reference", "chunked", "native", "exact"):
        assert found[f"self-test: {backend} on cpu, float32"]["works"] is True
    assert found["self-test: native on cpu, bfloat16"]["works"] is True
    assert main(["doctor"]) == 0
    assert "ok    WKV kernels, CPU" in capsys.readouterr().out


def test_a_missing_library_is_said_with_what_serves_instead(monkeypatch):
    monkeypatch.setattr(loader, "cpu", lambda: loader.Missing("Nothing compiled. `build` builds them."))
    found = rows()["WKV kernels, CPU"]
    assert (found.works, found.found) == (
        False, "Nothing compiled. `build` builds them. The chunked PyTorch form serves instead."
    )  # fmt: skip
    assert not any("native" in name for name in rows())


def test_a_wrong_kernel_ends_it_with_exit_code_5(monkeypatch, capsys):
    wrong = [("native", torch.float32, 0.5, 5e-5)]
    monkeypatch.setattr(self_test, "run", lambda device: iter(wrong))
    assert main(["doctor"]) == KernelError.exit_code
    assert "The WKV backend native on cpu, float32 is wrong: relative error 5.0e-01" in capsys.readouterr().err


def test_not_a_number_is_wrong_too(monkeypatch):
    monkeypatch.setattr(self_test, "run", lambda device: iter([("native", torch.float32, float("nan"), 5e-5)]))
    with pytest.raises(KernelError):
        doctor.examine()


def test_an_image_says_what_is_in_it(monkeypatch, tmp_path):
    described = tmp_path / "contents.json"
    monkeypatch.setenv(doctor.IMAGE_VARIABLE, str(described))
    contents = {"variant": "cuda", "revision": "abc", "packages": 7, "sbom": "/bill.json"}
    described.write_text(json.dumps(contents | {"kernels": {"cpu": [], "cuda": ["sm_90", "compute_90"]}}))
    found = rows()
    assert found["image"].found == "variant cuda, revision abc"
    assert found["image: WKV kernels"].found == "cpu, cuda sm_90 compute_90"
    assert found["image: packages"].found == "7, listed in /bill.json"


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"kernels": []}'])
def test_an_image_whose_description_is_damaged_is_said(text, monkeypatch, tmp_path):
    described = tmp_path / "contents.json"
    monkeypatch.setenv(doctor.IMAGE_VARIABLE, str(described))
    if text is not None:
        described.write_text(text)
    found = rows()["image"]
    assert found.works is False
    assert f"{described}, which RWKV_CLUSTER_IMAGE names, cannot be read" in found.found
