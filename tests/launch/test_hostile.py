"""E5, E6, E7: what stands in the file is refused, or reaches the program as one literal argument; secrets nowhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch_stubs import install, run_script

from rwkv_cluster.config import Config
from rwkv_cluster.errors import ConfigError, LaunchError
from rwkv_cluster.launch.plan import plan

PAYLOADS = [
    "a\ntouch canary", "a\rtouch canary", "a\0b", "a\tb", "\x1b[31m", "\x7f",
    "a\x85touch canary", "a\u2028touch canary",
    "a\u2029b", "a\u202eb", "\udcff", "\n#SBATCH --uid=0", "#SBATCH --wrap=touch", "%j", "%u-%N", "'", '"', "a'b",
    'a"b',
    "';touch canary;'", '";touch canary;"', "$(touch canary)", "`touch canary`", "${IFS}", "$HOME", "a;touch canary",
    "a|touch canary", "a&touch canary", "a>canary", "a<b", "\\", "a\\", "a b", " ", "*", "~root", "{a,b}", "!!",
    "--help",
    "-x", "../x", "a/../../b", "/dev/null;touch canary", "a:b", "a,b", "é🎉",
]  # fmt: skip
Fields = dict[str, Any]
FIELDS: dict[str, Callable[[str], Fields]] = {
    **{
        name: (lambda payload, name=name: {name: payload})  # type: ignore[misc]
        for name in ("name", "mem", "time", "partition", "account", "qos", "constraint", "exclude", "comment", "python")
    },
    "rdzv_endpoint": lambda payload: {"target": "torchrun", "num_nodes": 2, "rdzv_endpoint": payload},
    "hostfile": lambda payload: {"target": "deepspeed", "num_nodes": 2, "hostfile": payload},
    "slurm_parameters key": lambda payload: {"slurm_parameters": {payload: "1"}},
    "slurm_parameters": lambda payload: {"slurm_parameters": {"reservation": payload}},
    "env key": lambda payload: {"env": {payload: "1"}},
    "env": lambda payload: {"env": {"VALUE": payload}},
    "pass_env": lambda payload: {"pass_env": [payload]},
    "prepare.mem": lambda payload: {"prepare": {"own_job": True, "mem": payload}},
    "prepare.time": lambda payload: {"prepare": {"own_job": True, "time": payload}},
    "prepare.partition": lambda payload: {"prepare": {"own_job": True, "partition": payload}},
    "image": lambda payload: {"target": "docker", "container": {"image": payload}},
    "pyxis image": lambda payload: {"container": {"runtime": "pyxis", "image": payload}},
    "mounts": lambda payload: {"target": "docker", "container": {"image": "x", "mounts": [f"/{payload}"]}},
    "mounts target": lambda payload: {"target": "docker", "container": {"image": "x", "mounts": [f"/a:/{payload}"]}},
    "shm_size": lambda payload: {"target": "docker", "container": {"image": "x", "shm_size": payload}},
    "extra_args": lambda payload: {"target": "podman", "container": {"image": "x", "extra_args": [f"--a={payload}"]}},
    "extra_args name": lambda payload: {"target": "podman", "container": {"image": "x", "extra_args": [payload]}},
}
FREE_TEXT = {"env", "extra_args", "mounts", "mounts target", "python", "hostfile"}  # where a payload may well arrive


def attempt(folder: Path, fields: Fields, work_dir: str) -> list[str] | None:
    """Everything that the programs of the script were given; None where the launch was refused."""
    try:
        made = plan(Config(work_dir=work_dir, launch={"target": "sbatch", "python": "python-stub"} | fields), folder)
    except (ConfigError, LaunchError):
        return None
    calls = run_script(made, "job.sh", folder, install(folder / "bin"))
    assert not list(folder.rglob("canary*"))
    assert not Path("canary").exists()
    directives = [line for line in "".join(made.files.values()).splitlines() if line.startswith("#SBATCH")]
    return directives + [text for call in calls for text in (*call.argv, *call.environment.values())]


@pytest.mark.parametrize("field", FIELDS)
def test_payloads_are_refused_or_arrive_literally(field: str, tmp_path: Path) -> None:
    arrived = 0
    for number, payload in enumerate(PAYLOADS):
        if field == "python" and not payload.startswith("-"):
            continue  # a program that does not exist; its quoting is that of every Command
        folder = tmp_path / str(number)
        folder.mkdir()
        texts = attempt(folder, FIELDS[field](payload), str(folder / "work"))
        if texts is not None:
            literal = (
                os.path.expandvars(os.path.expanduser(payload)) if field == "hostfile" else payload
            )  # it is a path on this machine
            assert any(literal in text for text in texts), payload
            arrived += 1
    assert arrived == 0 or field in FREE_TEXT or arrived < 12


@pytest.mark.parametrize("field", ["name", "work_dir"])
def test_a_directory_of_any_visible_name_is_one_argument(field: str, tmp_path: Path) -> None:
    for number, payload in enumerate(PAYLOADS):
        folder = tmp_path / str(number)
        folder.mkdir()
        if field == "work_dir" and "/" not in payload and "\0" not in payload:
            texts = attempt(folder, {"target": "docker", "container": {"image": "x"}}, f"{folder}/{payload}w")
            assert texts is None or any(f"{folder}/{payload}w:" in text for text in texts)


def test_a_setup_line_cannot_swallow_the_next(tmp_path: Path) -> None:
    """Setup is shell code of the user's; an open quote or a trailing backslash ends with its line."""
    for number, line in enumerate(["echo 'open", "echo \\", "cat <<END", "if true; then"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        made = plan(Config(work_dir=str(folder / "w"), launch={"python": "python-stub", "setup": [line]}), folder)
        try:
            calls = run_script(made, "job.sh", folder, install(folder / "bin"))
        except AssertionError:
            continue  # the script ended there, with code 6
        assert any(call.argv[0] == "python-stub" for call in calls)


def test_secrets_are_written_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """E7, E8."""
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_canary")
    for target in ("torchrun", "sbatch", "docker"):
        launch = {"target": target, "pass_env": ["HF_TOKEN", "WANDB_API_KEY"], "container": {"image": "x"}}
        made = plan(Config(work_dir=str(tmp_path / "w"), launch=launch), tmp_path)
        assert "canary" not in json.dumps(dict(made.files))
        assert target == "torchrun" or "HF_TOKEN" in made.files["job.sh"]
    with pytest.raises(ConfigError, match=r"env has HF_TOKEN, which looks like a secret .* launch\.pass_env"):
        Config(launch={"env": {"HF_TOKEN": "hf_canary"}})
    with pytest.raises(ConfigError, match="extra_args has HF_TOKEN, which looks like a secret"):
        Config(launch={"container": {"extra_args": ["--env=A=1,HF_TOKEN=hf_canary"]}})


@pytest.mark.parametrize(
    "name",
    [
        "MY_PASS",
        "DB_PWD",
        "GITHUB_PAT",
        "HF_HUB_AUTH",
        "SSH_KEY",
        "WANDB_KEY",
        "OPENAI_KEY",
        "COOKIE",
        "AWS_SECRET_ACCESS_KEY",
        "APIKEY",
        "HFTOKEN",
        "githubPat",
        "dbPasswd",
        "HFToken",
        "PGPASSWORD",
        "GOOGLE_CREDENTIALS",
        "KEY2",
        "KEYS",
        "MY_KEYS",
        "SSH_PASSPHRASE",
    ],
)
def test_a_name_with_a_secrets_word_is_refused_unless_it_is_said_to_be_none(name: str) -> None:
    with pytest.raises(ConfigError, match=f"env has {name}, .*secret"):
        Config(launch={"env": {name: "1"}})
    assert Config(launch={"env": {name: "1"}, "not_secret": [name]}).launch.env == {name: "1"}


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "PATTERN",
        "PASSTHROUGH",
        "KEYBOARD_LAYOUT",
        "MONKEY",
        "TOKENIZERS_PARALLELISM",
        "AUTHOR",
        "COMPAT_MODE",
        "NCCL_IB_PKEY",
        "KEYRING_DIR",
        "COOKIECUTTER",
        "BYPASS",
        "LD_LIBRARY_PATH",
        "NCCL_DEBUG",
    ],
)
def test_a_name_that_only_looks_like_it_is_none(name: str) -> None:
    assert Config(launch={"env": {name: "1"}}).launch.env == {name: "1"}


@pytest.mark.parametrize("name", ["RANK", "SLURM_JOB_ID", "RWKV_CLUSTER_LAUNCH", "PET_NNODES"])
def test_variables_of_the_launcher_are_its_own(name: str) -> None:
    with pytest.raises(ConfigError, match=f"env has {name}, .*the launcher"):
        Config(launch={"env": {name: "1"}})


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"target": "docker"}, "container.image is not set"),
        ({"target": "local", "num_nodes": 2}, "Use torchrun, .*slurm or sbatch"),
        ({"target": "torchrun", "num_nodes": 2}, "rdzv_endpoint is not set"),
        ({"target": "deepspeed", "num_nodes": 2}, "hostfile is not set"),
        ({"container": {"runtime": "pyxis"}}, "image is not set"),
        ({"slurm_parameters": {"requeue": "1"}}, "has requeue, .*fields of launch"),
        ({"target": "slurm", "container": {"runtime": "pyxis", "image": "a"}}, "Use target sbatch"),
        ({"target": "torchrun", "sweep": [{"training.random_seed": 1}]}, "target slurm or sbatch"),
        ({"target": "slurm", "sweep": [{"work_dir": "elsewhere"}]}, "sweep sets work_dir, .*share"),
        ({"target": "slurm", "sweep": [{}]}, "no field in entry 0"),
        ({"time": "soon"}, '"D-HH:MM:SS"'),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_would(fields: Fields, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        Config(launch=fields)
