"""The image that the repository's Dockerfile makes: what is in it, and that runs in it are the runs outside of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from system.engine import IMAGE, LIMITS, ROOT, Engine, engine, reason_not_to
from system.processes import Job, Watched, alive, descendants, stopped_steps, wait_for_end, wait_until
from system.slurm_cluster import cluster, needs_slurm
from system.slurm_runs import finish, launch, new_run, wait_for_steps
from tiny_run import losses, tiny_run_config, write_config, write_text

import rwkv_cluster

pytestmark = pytest.mark.system

USER = 12345  # nobody in the image, nor here
LOCKED_DOWN = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--shm-size=64m")
PAGE = (ROOT / "docs/container.md").read_text()


@pytest.fixture(scope="module", params=["podman", pytest.param("docker", marks=pytest.mark.slow)])
def containers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine with the image. Where containers cannot run: skips, and fails in CI."""
    if reason := reason_not_to(request.param, tmp_path_factory.mktemp("tried")):
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"the image is not tested: {reason}")
    with engine(request.param, tmp_path_factory.mktemp("engine")) as made:
        yield made


class Container:
    """A detached container of the image, as the ordinary user, with `work` at /work and text to read at /text."""

    def __init__(self, engine: Engine, work: Path, *words: str, options: tuple[str, ...] = ()) -> None:
        self._engine = engine
        places = (f"--volume={work}:/work", f"--volume={work.parent}/text:/text:ro")
        user = (f"--user={USER}:{USER}", "--env=OMP_NUM_THREADS=1")
        self.id = engine("run", "--detach", *LOCKED_DOWN, *user, *places, *options, IMAGE, *words).strip()

    @property
    def state(self) -> dict[str, Any]:
        return self._engine.inspect("container", self.id)["State"]

    @property
    def text(self) -> str:
        run = self._engine.run("logs", self.id)
        return run.stdout + run.stderr

    def running(self) -> bool:
        return bool(self.state["Running"])

    def wait(self, timeout_s: float = 240.0) -> int:
        """The exit code of the container."""
        return int(self._engine("wait", self.id, timeout_s=timeout_s))

    def complete(self, timeout_s: float = 240.0) -> None:
        code = self.wait(timeout_s)
        assert code == 0, f"exit code {code}:\n{self.text}"


def _folder(path: Path) -> Watched:
    """Text, and an empty work directory of the ordinary user."""
    (path / "text").mkdir(parents=True)
    write_text(path / "text" / "text.jsonl", 20_000)
    (path / "work").mkdir()
    os.chown(path / "work", USER, USER)
    for place in (path, *list(path.parents)[:3]):  # pytest makes its folders for root alone
        if place.stat().st_uid == os.getuid() and place != Path("/tmp"):
            place.chmod(place.stat().st_mode | 0o055)
    watched = Watched(path)
    watched.work = type(watched.work)(path / "work" / "quickstart")
    return watched


def _quickstart(text: str, **changes: object) -> tuple[str, ...]:
    """The recipe, smaller, and on other text."""
    training = {"num_threads": 1, "micro_bsz": 2, "val_max_tokens": 1024}
    values = {f"training.{name}": value for name, value in (training | changes).items()}
    values |= {"model.n_layer": 2, "model.n_embd": 64, "data.inputs": f"[{text}]", "logging.sample_tokens": 8}
    return ("configs/quickstart.yaml", *(f"--{name}={value}" for name, value in values.items()))


def test_doctor_without_a_gpu(containers: Engine) -> None:
    locked = (*LOCKED_DOWN, "--network=none", f"--user={USER}:{USER}")
    rows = {
        row["name"]: row for row in json.loads(containers("run", "--rm", *locked, IMAGE, "doctor", "--json"))["rows"]
    }
    assert rows["image"]["text"] == "variant cpu, revision unknown"
    assert rows["image: WKV kernels"]["text"] == "cpu"
    assert rows["DeepSpeed operators"]["text"].startswith("prebuilt: cpu_adam; ")
    assert rows["WKV kernels, CPU"]["state"] == "ok"
    assert "/opt/kernels/libwkv_cpu.so" in rows["WKV kernels, CPU"]["text"]
    assert rows["self-test: native on cpu, float32"]["state"] == "ok"
    assert rows["CUDA"]["state"] == "note"
    assert "CPU build" in rows["CUDA"]["text"]
    assert rows["nvcc"]["state"] == "note"
    assert rows["disk"]["text"] == "/ cannot be written: Read-only file system"
    assert rows["shared memory"]["state"] == "note"
    table = containers("run", "--rm", *locked, IMAGE)
    assert "variant cpu" in table, "without a verb the image examines itself"


def test_what_is_in_the_image_and_what_is_not(containers: Engine) -> None:
    described = containers.inspect("image", IMAGE)
    config = described["Config"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"][0] == "/usr/bin/tini"
    health = config.get("Healthcheck") or described["Healthcheck"]  # docker's place, podman's
    assert health["Test"] == ["CMD", "rwkv-cluster", "doctor"]
    environment = dict(entry.split("=", 1) for entry in config["Env"])
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "", "enroot would ask for GPUs"
    assert "MELLANOX_VISIBLE_DEVICES" not in environment, "enroot would ask for InfiniBand"
    look = """
import importlib.metadata, json, shutil, pathlib
names = ("gcc", "g++", "cc", "c++", "nvcc", "pip", "ninja-build", "git", "make")
bill = json.load(open("/opt/image/sbom.cdx.json"))
print(json.dumps({
    "found": [name for name in names if shutil.which(name)],
    "torch": importlib.metadata.version("torch"),
    "version": importlib.metadata.version("rwkv-cluster"),
    "leaks": [str(p) for p in map(pathlib.Path, ("/etc/pip.conf", "/run/ca.pem", "/lock", "/src")) if p.exists()],
    "bill": {part["name"]: part["version"] for part in bill["components"]},
}))
"""
    inside = json.loads(containers("run", "--rm", IMAGE, "python3", "-c", look))
    labels = config["Labels"]
    assert inside["found"] == []
    assert inside["leaks"] == []
    assert inside["torch"] == f"{labels['rwkv-cluster.torch']}+cpu"
    assert inside["version"] == labels["org.opencontainers.image.version"] == rwkv_cluster.__version__
    assert labels["rwkv-cluster.variant"] == "cpu"
    locked = {}
    for name in ("common", "cpu"):
        for line in (ROOT / ".docker" / "lock" / f"{name}.txt").read_text().splitlines():
            package, _, version = line.split()[0].partition("==")
            locked[package] = version
    bill = {name.lower().replace("_", "-"): version for name, version in inside["bill"].items()}
    assert {name: bill.get(name) for name in locked} == locked
    assert {"libc6", "tini", "rwkv-cluster"} <= bill.keys()
    login = ("bash", "--login", "-c", "command -v rwkv-cluster python3")  # as enroot starts what it is told to
    assert containers("run", "--rm", IMAGE, *login).split() == ["/opt/venv/bin/rwkv-cluster", "/opt/venv/bin/python3"]


@pytest.mark.parametrize("max_steps", [100, pytest.param(None, marks=pytest.mark.slow)], ids=["shorter", "whole"])
def test_the_quickstart_stopped_continued_and_equal_to_the_run_outside(
    max_steps: int | None, containers: Engine, tmp_path: Path
) -> None:
    """The command of docs/container.md. Outside, the same recipe reads what the image prepared."""
    inside, outside = _folder(tmp_path / "inside"), _folder(tmp_path / "outside")
    shorter = (f"--training.max_steps={max_steps}",) if max_steps else ()
    words = ("train", "configs/quickstart.yaml", *shorter)
    first = Container(containers, inside.folder / "work", *words)

    def under_way() -> bool:
        assert first.running(), first.text
        return inside.steps_logged() >= 50

    wait_until(under_way, what="step 50")
    started = time.monotonic()
    containers("stop", "--time=20", first.id)  # at once: it has 50 steps left
    assert time.monotonic() - started < 15
    shutil.copytree(inside.work.data, outside.work.data)
    ran = Job(outside.folder, config="configs/quickstart.yaml", arguments=("--data.inputs=[]", *shorter))
    assert first.state["ExitCode"] == 75, first.text
    assert stopped_steps(first.text) == {0: inside.newest_checkpoint()}
    assert inside.newest_checkpoint() >= 50
    second = Container(containers, inside.folder / "work", *words)
    second.complete(timeout_s=600)
    assert inside.sessions() == 2
    assert ran.wait(timeout_s=600) == 0, ran.text
    assert inside.result() == outside.result()
    assert (inside.work.out / "rwkv-final.pth").read_bytes() == (outside.work.out / "rwkv-final.pth").read_bytes()
    if not shorter:
        stated, tolerance = map(float, re.findall(r"ends there with a loss of (\d+\.\d+) ± (\d+\.\d+)", PAGE)[0])
        record = (inside.work.logs / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(record)["val_loss"] == pytest.approx(stated, abs=tolerance)
    assert {(path.stat().st_uid, path.stat().st_gid) for path in (inside.folder / "work").rglob("*")} == {(USER, USER)}


def test_deepspeeds_optimizer_is_compiled_already(containers: Engine) -> None:
    """It steps in an image without a compiler, on a read-only root, and as AdamW does in float64."""
    steps = """
import json, torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
torch.manual_seed(0)
start = torch.randn(3, 1001)
rate = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
fast, exact = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())
optimizers = [DeepSpeedCPUAdam([fast], adamw_mode=True, **rate), torch.optim.AdamW([exact], **rate)]
for _ in range(10):
    gradient = torch.randn(3, 1001)
    fast.grad, exact.grad = gradient, gradient.double()
    for optimizer in optimizers:
        optimizer.step()
print(json.dumps(float((fast.double() - exact).abs().max() / exact.abs().max())))
"""
    environment = ("--env=DS_ACCELERATOR=cpu", f"--user={USER}:{USER}", "--env=OMP_NUM_THREADS=1")
    said = containers("run", "--rm", *LOCKED_DOWN, *environment, IMAGE, "python3", "-c", steps)
    assert float(said.splitlines()[-1]) < 1e-6


def test_nothing_outlives_the_first_process(containers: Engine, tmp_path: Path) -> None:
    """kill -9 of the container's PID 1 while two ranks train."""
    run = _folder(tmp_path / "run")
    config = _quickstart("/text", max_steps=100_000)
    words = ("torchrun", "--standalone", "--nproc-per-node=2", "--no-python", "rwkv-cluster", "train", *config)
    container = Container(containers, run.folder / "work", *words)

    def under_way() -> bool:
        assert container.running(), container.text
        return run.steps_logged() >= 3

    wait_until(under_way, what="step 3")
    first = container.state["Pid"]
    below = descendants(first)
    assert len(below) >= 3, "torchrun and two ranks"
    os.kill(first, 9)
    wait_for_end([first, *below], timeout_s=15)
    assert container.wait(20) == 137
    assert not any(map(alive, below))


def test_two_containers_on_a_network_of_their_own_equal_one(containers: Engine, tmp_path: Path) -> None:
    one, two = _folder(tmp_path / "one"), _folder(tmp_path / "two")
    Container(containers, one.folder / "work", "train", *_quickstart("/text", max_steps=8, micro_bsz=4)).complete()
    containers("network", "create", "ranks")
    config = _quickstart("/text", max_steps=8, timeout_s=60)
    names = ("node0", "node1")
    meeting = (
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-id=two",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node0:29400",
    )
    words = ("torchrun", *meeting, "--no-python", "rwkv-cluster", "train", *config)
    nodes = [
        Container(
            containers,
            two.folder / "work",
            *words,
            options=("--network=ranks", f"--name={name}", f"--hostname={name}"),
        )
        for name in names
    ]
    for node in nodes:
        node.complete()
    assert losses(two.work.root) == pytest.approx(losses(one.work.root), rel=1e-6)


def test_launch_starts_it(containers: Engine, tmp_path: Path, start: Callable[..., Job]) -> None:
    """By the product's own command, with the directories at their own paths; the files belong to the caller."""
    container = {"image": IMAGE, "shm_size": "64m", "extra_args": [*LIMITS, "--network=none"]}
    launch = {"target": containers.program, "ranks_per_node": 2, "container": container}
    config = tiny_run_config(tmp_path, training={"micro_bsz": 2, "global_batch_size": 4}, launch=launch)
    write_config(tmp_path / "run.yaml", config)
    job = start(tmp_path, verb="launch", environment=containers.environment)
    job.complete()
    run = Watched(tmp_path)
    assert run.newest_checkpoint() == 8
    assert {path.stat().st_uid for path in run.work.root.rglob("*")} == {os.getuid()}


@needs_slurm
@pytest.mark.parametrize("target", ["sbatch", pytest.param("slurm", marks=pytest.mark.slow)])
def test_a_slurm_job_in_containers_is_queued_again_and_goes_on(
    target: str, containers: Engine, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On two nodes, each with a container: the signal reaches the ranks inside, the requeue happens outside."""
    plain = tmp_path / "plain"
    plain.mkdir()
    write_config(plain / "run.yaml", tiny_run_config(plain, training={"max_steps": 40, "micro_bsz": 4}))
    Job(plain).complete()
    by_name = ("--volume=/etc/hosts:/etc/hosts:ro", "--volume=/etc/hostname:/etc/hostname:ro")
    container = {"runtime": containers.program, "image": IMAGE, "extra_args": [*LIMITS, *by_name]}
    run = new_run(tmp_path / "run", {"max_steps": 40}, target=target, container=container, env=containers.environment)
    root = tmp_path_factory.mktemp("slurm")  # a short path, which Slurm's sockets want
    before = {*containers("ps", "--all", "--quiet").split()}
    with cluster(root, nodes=2) as slurm:
        job = launch(slurm, run)
        wait_for_steps(slurm, run, job, step=10)
        slurm.run("scancel", "--signal=USR2", job)
        wait_until(lambda: slurm.restarts(job) == 1, what="the restart")
        finish(slurm, run, job)
    assert run.sessions() == 2
    assert losses(run.work.root) == pytest.approx(losses(Watched(plain).work.root), rel=1e-6)
    assert {*containers("ps", "--all", "--quiet").split()} <= before, "a container is left"


def test_a_change_of_python_rebuilds_the_last_layers_only(containers: Engine, tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    for name in ("Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, context)
    for name in (".docker", "rwkv_cluster", "kernels", "launch", "configs"):
        shutil.copytree(ROOT / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
    before = containers.inspect("image", IMAGE)["RootFS"]["Layers"]
    with open(context / "rwkv_cluster" / "errors.py", "a") as source:
        source.write("CHANGED = True\n")
    containers.build(context, tag="localhost/changed")
    after = containers.inspect("image", "localhost/changed")["RootFS"]["Layers"]
    assert len(before) == len(after)
    shared = [old for old, new in zip(before, after, strict=True) if old == new]
    assert before[: len(shared)] == shared
    assert len(before) - len(shared) <= 2, "the package and the list of contents"
    assert "True" in containers(
        "run", "--rm", "localhost/changed", "python3", "-c", "from rwkv_cluster import errors; print(errors.CHANGED)"
    )
