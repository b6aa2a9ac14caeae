"""Doctor's rows about the machine, each with the fault that it is for: provoked, where that takes no privilege."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rwkv_cluster.config import Config
from rwkv_cluster.doctor.checks import deepspeed, environment, gpus, host, software, storage, tools
from rwkv_cluster.doctor.context import CheckContext
from rwkv_cluster.doctor.results import Row, refused
from rwkv_cluster.errors import LaunchError
from rwkv_cluster.runtime import nccl_shared_memory

TWO_GPUS = "NVIDIA H100 80GB HBM3, 81559, 4, 570.86.15\nNVIDIA H100 80GB HBM3, 81559, 71000, 570.86.15"


@pytest.fixture(autouse=True)
def _listed_anew() -> Iterator[None]:
    gpus.listed.cache_clear()
    yield
    gpus.listed.cache_clear()


def program(folder: Path, name: str, script: str, monkeypatch: Any) -> None:
    """A program that is found first."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def nvidia_smi(folder: Path, monkeypatch: Any, output: str = TWO_GPUS) -> None:
    program(folder, "nvidia-smi", f"cat <<END\n{output}\nEND", monkeypatch)


def limited(kind: int, value: int) -> Row:
    """The row of a process that has this soft limit."""
    code = "from rwkv_cluster.doctor import context\nfrom rwkv_cluster.doctor.checks import host\n"
    code += "print(*[f'{r.state}|{r.text}|{r.remedy}' for r in host.limits(context.CheckContext())], sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(kind, (value, resource.getrlimit(kind)[1])),
        capture_output=True,
        text=True,
        check=True,
    )
    index = (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_STACK).index(kind)
    state, text, remedy = done.stdout.splitlines()[index].split("|")
    return Row("", state, text, remedy)  # type: ignore[arg-type]


def test_few_open_files() -> None:
    row = limited(resource.RLIMIT_NOFILE, 64)
    assert row.state == "warning"
    assert row.text.startswith("64 ")
    assert "`Too many open files`" in row.text
    assert row.remedy.startswith("`ulimit -n 65536`")
    assert limited(resource.RLIMIT_NOFILE, 4096).state == "ok"


def test_a_small_stack() -> None:
    row = limited(resource.RLIMIT_STACK, 2**20)
    assert row.state == "warning"
    assert row.text.startswith("1,024 KiB: ")
    assert limited(resource.RLIMIT_STACK, 16 * 2**20).text == "16,384 KiB"


def test_little_locked_memory_matters_with_infiniband(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (65536, 65536))
    monkeypatch.setattr(host, "INFINIBAND", tmp_path)
    assert host._locked_memory().state == "ok"
    (tmp_path / "mlx5_0").mkdir()
    assert host._locked_memory().state == "warning"
    assert "--ulimit memlock=-1" in host._locked_memory().remedy


def test_shared_memory_matters_with_several_gpus(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(nccl_shared_memory, "WANTED_BYTES", 2**60)
    (row,) = host.shared_memory(CheckContext())
    assert row.state == "note"
    nvidia_smi(tmp_path, monkeypatch)
    gpus.listed.cache_clear()
    (row,) = host.shared_memory(CheckContext())
    assert row.state == "warning"
    assert "keeps NCCL from" in row.text
    assert "--shm-size" in row.remedy


def test_more_threads_than_processors() -> None:
    many = (os.cpu_count() or 1) + 1
    (row,) = host.processors(CheckContext(Config(training={"num_threads": many})))
    assert row.state == "warning"
    assert f"the threads of 1 rank, {many} each, " in row.text
    assert host.processors(CheckContext(Config(training={"num_threads": 1})))[0].state == "ok"


def test_memory_is_that_of_this_machine() -> None:
    (row,) = host.memory(CheckContext())
    assert float(row.text.split()[0]) == pytest.approx(
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, abs=1
    )


def test_numbers_are_written_as_ranges() -> None:
    assert host.numbers([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_gpus_are_listed_without_torch(tmp_path: Path, monkeypatch: Any) -> None:
    nvidia_smi(tmp_path, monkeypatch)
    driver, first, second = gpus.driver(CheckContext())
    assert (driver.state, driver.text) == ("ok", "570.86.15")
    assert (first.state, first.text) == ("ok", "NVIDIA H100 80GB HBM3, 80 GiB")
    assert (second.state, second.text) == ("warning", "NVIDIA H100 80GB HBM3, 80 GiB, of which 69 are in use")


def test_a_gpu_that_does_not_tell_its_memory(tmp_path: Path, monkeypatch: Any) -> None:
    nvidia_smi(tmp_path, monkeypatch, "Orin (nvgpu), [N/A], [Not Supported], 540.3.0")
    assert gpus.driver(CheckContext())[1] == Row("GPU 0", "ok", "Orin (nvgpu)")


def test_gpus_that_torch_does_not_see(tmp_path: Path, monkeypatch: Any) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpus, "listed", tuple)
    assert gpus.torch_cuda(CheckContext())[0].state == "note"
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpus.listed.cache_clear()
    nvidia_smi(tmp_path, monkeypatch)
    (row,) = gpus.torch_cuda(CheckContext())
    assert row.state == "warning"
    assert row.text.startswith("nvidia-smi shows GPUs, but torch finds none (torch is ")


def test_what_torch_compile_needs_on_a_gpu(monkeypatch: Any) -> None:
    import torch

    from rwkv_cluster.kernels.fused import ops as fused

    names = [row.name for row in software.compilers(CheckContext())]
    assert "torch.compile" not in names
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused, "missing_for_compile", lambda device_type: "a C compiler")
    monkeypatch.setattr(fused, "has_native", lambda device_type: True)
    assert software.compilers(CheckContext())[-1].state == "note"
    monkeypatch.setattr(fused, "has_native", lambda device_type: False)
    row = software.compilers(CheckContext())[-1]
    assert (row.name, row.state) == ("torch.compile", "warning")
    assert row.text.startswith("it needs a C compiler, which is not here")
    monkeypatch.setattr(fused, "missing_for_compile", lambda device_type: None)
    assert software.compilers(CheckContext())[-1].state == "ok"


@pytest.mark.gpu
def test_the_real_driver_and_torch_agree() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    assert len(gpus.listed()) >= torch.cuda.device_count()
    assert gpus.torch_cuda(CheckContext())[0].state == "ok"


def test_an_nvidia_smi_that_hangs_is_left_alone(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("rwkv_cluster.doctor.subprocesses.PATIENCE_S", 0.2)
    program(tmp_path, "nvidia-smi", "exec sleep 30", monkeypatch)
    assert gpus.listed() == ()


def test_variables_that_matter_are_told_and_secrets_are_not() -> None:
    """E7."""
    found = environment.relevant(
        {
            "NCCL_DEBUG": "INFO",
            "CUDA_VISIBLE_DEVICES": "0,1",
            "HOME": "/root",
            "WANDB_API_KEY": "k3y",
            "NCCL_PROXY_PASSWORD": "k3y",
            "RWKV_CLUSTER_TOKEN": "k3y",
            "OMP_NUM_THREADS": "4\n\x1b[31m",
            "NCCL_NET": "x" * 200,
        }
    )
    assert found == {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "NCCL_DEBUG": "INFO",
        "NCCL_NET": "x" * 120 + "...",
        "OMP_NUM_THREADS": "4\\n\\x1b[31m",
    }


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("NCCL_P2P_DISABLE", "1", "do not send to"),
        ("CUDA_LAUNCH_BLOCKING", "1", "every kernel waits"),
        ("NCCL_SOCKET_IFNAME", "ib7", "NCCL_SOCKET_IFNAME is ib7, .* are lo"),
        ("GLOO_SOCKET_IFNAME", "ib7", "GLOO_SOCKET_IFNAME is ib7"),
        ("NCCL_P2P_DISABLE", "0", ""),
        ("NCCL_SOCKET_IFNAME", "^docker0", ""),
        ("NCCL_SOCKET_IFNAME", "=lo", ""),
        ("NCCL_SOCKET_IFNAME", "l", ""),
    ],
)
def test_variables_that_slow_down_or_mislead(name: str, value: str, says: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(name, value)
    warnings = [row for row in environment.variables(CheckContext()) if row.name == name]
    assert [row.state for row in warnings] == (["warning"] if says else [])
    assert not says or re.search(says, warnings[0].text)


def test_deepspeed_tells_its_operators(tmp_path: Path) -> None:
    written = (
        "version='0.19'\ninstalled_ops={'deepspeed_not_implemented': False, 'cpu_adam': True, 'async_io': False}\n"
    )
    (tmp_path / "git_version_info_installed.py").write_text(written)
    assert deepspeed.prebuilt(tmp_path) == {"cpu_adam": True, "async_io": False}
    assert deepspeed.prebuilt(tmp_path / "elsewhere") == {}
    version, operators = deepspeed.deepspeed(CheckContext())
    assert version.state == "ok"
    assert operators.text.startswith("prebuilt: ")


def test_slurm_and_its_containers(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tools.slurm(CheckContext())[0].state == "note"
    assert tools.containers(CheckContext()) == [Row("container engines", "note", "none is here")]
    program(tmp_path, "sinfo", "exit 1", monkeypatch)
    assert re.fullmatch("sinfo .*does not work", tools.slurm(CheckContext())[0].text)
    program(tmp_path, "sinfo", "echo slurm 24.05.3", monkeypatch)
    program(tmp_path, "srun", "echo '  --container-image=[USER@][REGISTRY#]IMAGE'", monkeypatch)
    program(tmp_path, "podman", "echo podman version 5.1.0", monkeypatch)
    assert tools.slurm(CheckContext())[0].text == "slurm 24.05.3, without sbatch, srun with containers"
    assert tools.containers(CheckContext())[0].text == "podman 5.1.0"
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert "srun started 4 tasks, " in tools.slurm(CheckContext())[0].text


def test_a_disk_that_is_slow(tmp_path: Path, monkeypatch: Any) -> None:
    sync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.3)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    row = storage._speed(tmp_path, tmp_path)
    assert row.state == "warning"
    assert row.figure is not None
    assert row.figure < 20
    assert (tmp_path / "speed").stat().st_size == 2 * storage.BLOCK_BYTES


@pytest.mark.parametrize(("number", "state"), [(None, "problem"), (errno.ENOLCK, "warning")])
def test_a_file_system_without_locks(number: int | None, state: str, tmp_path: Path, monkeypatch: Any) -> None:
    def flock(file: object, kind: int) -> None:
        if number is not None:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    row = storage._locks(tmp_path)
    assert row.state == state
    assert "nolock" in row.remedy


def test_a_folder_that_cannot_be_written(monkeypatch: Any) -> None:
    """/proc takes no files, not even root's."""
    (row,) = storage.storage(CheckContext(Config(work_dir=f"{__file__}/work")))
    assert row.sentence == f"{__file__} is not a directory. Choose another work_dir"
    row = storage.storage(CheckContext(Config(work_dir="/proc/work")))[-1]
    assert (row.state, row.exit_code) == ("problem", 2)
    assert row.text.startswith("/proc cannot be written: ")
    monkeypatch.chdir("/proc")
    assert storage.storage(CheckContext())[-1].state == "note"


def test_an_error_is_split_into_what_is_found_and_what_to_do() -> None:
    row = refused("x", LaunchError("a.b is 3. It must be 4", remedy="Set it"))
    assert (row.text, row.remedy, row.exit_code) == ("a.b is 3. It must be 4", "Set it", 6)
    assert refused("x", LaunchError("nothing works")).sentence == "nothing works"
