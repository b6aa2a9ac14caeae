"""The `launch` section: where a run is started, with what resources and in which container.

Its values reach batch scripts and command lines, so each text field accepts what its purpose needs and no more: a name
has no blanks, nothing begins with a dash but an option, no path climbs with `..`, nothing holds a control character.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rwkv_cluster.config.kubernetes import KubernetesConfig, SkypilotConfig
from rwkv_cluster.config.section import Section, path_text
from rwkv_cluster.runtime.terminal.plain_text import hidden_character

Target = Literal["local", "torchrun", "deepspeed", "docker", "podman", "sbatch", "slurm", "kubernetes", "skypilot"]
SWEEP_TARGETS = ("slurm", "sbatch")  # that have job arrays
Runtime = Literal["none", "docker", "podman", "apptainer", "pyxis"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_WORD = re.compile(r"[A-Za-z0-9_(\[][A-Za-z0-9_.,:;@/+=*|&\[\](){}-]{0,999}")  # node lists, constraints, amounts
_SENTENCE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ .,:;@/+=()-]{0,199}")
_TIME = re.compile(r"(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2})")
_SIZE = re.compile(r"[0-9]+[kKmMgGtT]?[bB]?")
_IMAGE = re.compile(r"[A-Za-z0-9/._][A-Za-z0-9/._:@+#-]{0,499}")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")
_ENDPOINT = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(:\d{1,5})?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_WORD_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # of a variable's name: HF_TOKEN, HFToken, hf_token
_SECRET_PARTS = re.compile(
    r"((API|ACCESS|AUTH|PRIVATE|SECRET|SIGNING|SSH)?KEY|\w*TOKEN|\w*SECRET|COOKIE|CREDENTIAL)S?|"
    r"\w*PASSWORD|\w*PASSWD|PASS|PASSPHRASE|PWD|AUTH|PAT|CREDS?"
)
_OURS = re.compile(r"SLURM_\w+|RWKV_CLUSTER_\w+|(LOCAL_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|PET_\w+")
_SET_BY_US = re.compile(
    "job-name|nodes|ntasks|ntasks-per-node|cpus-per-task|gpus-per-node|time|mem|partition|account|qos|constraint|exclude|"
    "comment|signal|requeue|no-requeue|open-mode|output|error|array|dependency|export|export-file|get-user-env|chdir|wrap|"
    "parsable|wait|input|uid|gid"
)


class ContainerConfig(Section):
    """The container that the ranks run in. The work directory and the current one are always mounted."""

    runtime: Runtime = Field(
        "none", description="inside Slurm: none, pyxis (with enroot), apptainer, podman or docker; target docker and "
        "podman set it themselves"
    )  # fmt: skip
    image: str | None = Field(None, description="image name, .sif or .sqsh file")
    mounts: list[str] = Field(
        default_factory=list, description="further folders, each HOST, HOST:CONTAINER or HOST:CONTAINER:ro"
    )
    user: Literal["caller", "image"] = Field(
        "caller", description="docker, podman: run as the calling user, who then owns all files, or as the image says"
    )
    shm_size: str = Field(
        "16g", description="docker, podman, Kubernetes: size of /dev/shm, which NCCL and data workers use"
    )
    extra_args: list[str] = Field(
        default_factory=list, description="further options of the container's command, each --name or --name=value"
    )

    @field_validator("image")
    @classmethod
    def _image(cls, value: str | None) -> str | None:
        return _checked(value, _IMAGE, "image", "an image name or path without `..`", path=True)

    @field_validator("shm_size")
    @classmethod
    def _shm_size(cls, value: str) -> str:
        return str(_checked(value, _SIZE, "shm_size", "a size such as 16g"))

    @field_validator("mounts")
    @classmethod
    def _mounts(cls, value: list[str]) -> list[str]:
        for mount in value:
            _refuse_hidden(mount, "mounts")
            host, *rest = mount.split(":")
            places = [host, *rest[:1]]
            sound = len(rest) < 3 and rest[1:] in ([], ["ro"], ["rw"]) and "," not in mount
            if not sound or not all(place.startswith("/") and ".." not in place.split("/") for place in places):
                raise ValueError(
                    f"mounts has {mount[:80]!a}. Write HOST, HOST:CONTAINER or HOST:CONTAINER:ro with absolute paths, "
                    "without `..`, commas and further colons"
                )
        return value

    @field_validator("extra_args")
    @classmethod
    def _extra_args(cls, value: list[str]) -> list[str]:
        for argument in value:
            _refuse_hidden(argument, "extra_args")
            if not re.match(r"--[a-z]", argument):
                raise ValueError(f"extra_args has {argument[:80]!a}. Write each option as --name or --name=value")
        return value

    @model_validator(mode="after")
    def _image_given(self) -> ContainerConfig:
        if self.runtime != "none" and not self.image:
            raise ValueError(f"runtime is {self.runtime}, but image is not set. Name an image")
        return self


class PrepareJobConfig(Section):
    """Slurm, JobSet: the data prepared by a job of its own, without GPUs, that training waits for."""

    own_job: bool = Field(False, description="prepare the data in a job of its own before the training job")
    cpus: int = Field(4, ge=1, le=100_000, description="CPUs of that job")
    mem: str | None = Field(None, description="its memory, such as 16G")
    time: str | None = Field(None, description='its time limit, such as "2:00:00"')
    partition: str | None = Field(None, description="its partition; default: that of the training job")

    @field_validator("mem", "time", "partition")
    @classmethod
    def _words(cls, value: str | None, info: object) -> str | None:
        return _check_word(getattr(info, "field_name", ""), value)


class LaunchConfig(Section):
    """Where and how `rwkv-cluster launch` starts the run."""

    target: Target = Field(
        "local", description="local (one process here), torchrun, deepspeed, docker, podman, slurm (through submitit), "
        "sbatch (Slurm without submitit), kubernetes or skypilot (--dry-run alone)"
    )  # fmt: skip
    name: str = Field("rwkv", description="name of the job and of the container")
    num_nodes: int = Field(1, ge=1, le=100_000, description="machines")
    gpus_per_node: int | None = Field(None, ge=0, le=1024, description="GPUs to ask for on each node; default: none")
    ranks_per_node: int | None = Field(
        None, ge=1, le=1024, description="processes on each node; default: gpus_per_node, else training.devices"
    )
    cpus_per_node: int | None = Field(
        None, ge=1, le=100_000, description="Slurm, Kubernetes: CPUs to ask for on each node"
    )
    mem: str | None = Field(None, description="Slurm, Kubernetes: memory of each node, such as 64G")
    time: str | None = Field(None, description='Slurm: time limit, minutes or "H:MM:SS" or "D-HH:MM:SS"')
    partition: str | None = Field(None, description="Slurm: partition")
    account: str | None = Field(None, description="Slurm: account that is charged")
    qos: str | None = Field(None, description="Slurm: quality of service")
    constraint: str | None = Field(None, description="Slurm: features that a node must have")
    exclude: str | None = Field(None, description="Slurm: nodes not to use, such as node[3,7-9]")
    comment: str | None = Field(None, description="Slurm: comment on the job")
    signal_s: int = Field(
        120, ge=1, le=65_535, description="Slurm: ask for a checkpoint this many seconds before the time limit; "
        "Kubernetes: seconds for one before a pod is killed"
    )  # fmt: skip
    requeue: bool = Field(
        True,
        description="Slurm: after a preemption or time limit, queue the same job again; Kubernetes: start pods again",
    )
    max_requeues: int = Field(100, ge=0, le=1_000_000, description="Slurm: queue it again at most this often")
    exclude_bad_nodes: bool = Field(
        False, description="Slurm: after a node has failed its checks, queue the job again without it"
    )  # fmt: skip
    sweep: list[dict[str, Any]] = Field(
        default_factory=list, description="Slurm: a job array with one run for each entry, which names fields and "
        "their values, such as {training.random_seed: 2}; run N is in <work_dir>/sweep/N"
    )  # fmt: skip
    sweep_at_once: int | None = Field(
        None, ge=1, le=100_000, description="Slurm: runs of the sweep at the same time, at most"
    )
    task_per: Literal["node", "rank"] = Field(
        "node", description="Slurm: a task for each node, which runs torchrun, or a task for each rank"
    )
    slurm_parameters: dict[str, str] = Field(
        default_factory=dict, description="Slurm: further options of sbatch, such as {reservation: gpu-week}"
    )
    setup: list[str] = Field(
        default_factory=list, description="shell lines that run on each node's host before training, such as "
        "`module load cuda`"
    )  # fmt: skip
    env: dict[str, str] = Field(
        default_factory=dict, description="environment variables of the ranks, such as {NCCL_DEBUG: INFO}"
    )
    pass_env: list[str] = Field(
        default_factory=list, description="names of variables taken from the caller's environment, the way for "
        "secrets: their values are in no file of the launch"
    )  # fmt: skip
    not_secret: list[str] = Field(
        default_factory=list, description="names of variables that look like a secret, such as SORT_KEY, and whose "
        "values may be written all the same"
    )  # fmt: skip
    python: str | None = Field(
        None, description="Python that has rwkv_cluster where the ranks run; default: this one, in a container python3"
    )
    rdzv_endpoint: str | None = Field(
        None, description="torchrun on several nodes outside Slurm: first node as HOST or HOST:PORT"
    )
    hostfile: str | None = Field(None, description="deepspeed on several nodes: its hostfile, `HOST slots=N` lines")
    hosts: list[str] = Field(
        default_factory=list, description="deepspeed on several nodes: their names, from which a hostfile is made"
    )  # fmt: skip
    container: ContainerConfig = Field(default_factory=ContainerConfig, description="container")
    prepare: PrepareJobConfig = Field(default_factory=PrepareJobConfig, description="data preparation")
    kubernetes: KubernetesConfig = Field(default_factory=KubernetesConfig, description="target kubernetes")
    skypilot: SkypilotConfig = Field(default_factory=SkypilotConfig, description="target skypilot")

    _paths = field_validator("hostfile", mode="before")(path_text)

    @field_validator("name", "mem", "time", "partition", "account", "qos", "constraint", "exclude", "comment",
                     "rdzv_endpoint", "python", "hostfile")  # fmt: skip
    @classmethod
    def _words(cls, value: str | None, info: object) -> str | None:
        return _check_word(getattr(info, "field_name", ""), value)

    @field_validator("slurm_parameters")
    @classmethod
    def _parameters(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not _OPTION.fullmatch(name):
                raise ValueError(f"slurm_parameters has the name {name[:80]!a}. Use sbatch's long names without dashes")
            if _SET_BY_US.fullmatch(name):
                raise ValueError(f"slurm_parameters has {name}, which other fields of launch set. Remove it")
            _checked(text, _WORD, f"slurm_parameters.{name}", "letters, digits and .,:;@/+=*|&[](){}-_ without blanks")
        return value

    @field_validator("hosts")
    @classmethod
    def _hosts(cls, value: list[str]) -> list[str]:
        for host in value:
            _checked(host, _HOST, "hosts", "the names of machines")
        return value

    @field_validator("setup")
    @classmethod
    def _setup(cls, value: list[str]) -> list[str]:
        for line in value:
            _refuse_hidden(line, "setup")
        return value

    @field_validator("env")
    @classmethod
    def _env(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            _variable(name, "env")
            _refuse_hidden(text, f"env.{name}")
        return value

    @field_validator("sweep")
    @classmethod
    def _sweep(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for number, overrides in enumerate(value):
            if not overrides:
                raise ValueError(f"sweep has no field in entry {number}. Name one, as in {{training.random_seed: 2}}")
            for name in overrides:
                if name == "work_dir" or name.split(".")[0] == "launch":
                    raise ValueError(f"sweep sets {name}, which all its runs share. Leave it to the rest of the file")
        return value

    @field_validator("pass_env")
    @classmethod
    def _pass_env(cls, value: list[str]) -> list[str]:
        for name in value:
            _variable(name, "pass_env")
        return value

    @model_validator(mode="after")
    def _no_secret_is_written(self) -> LaunchConfig:
        options = [argument for argument in self.container.extra_args if argument.startswith("--env=")]
        in_options = [name for option in options for name in re.findall(r"[=,](\w+)=", option)]
        for field, names in (("env", self.env), ("container.extra_args", in_options)):
            secret = next((name for name in names if looks_secret(name) and name not in self.not_secret), None)
            if secret is not None:
                instead = "Put the name into launch.pass_env instead and set the variable where you launch"
                if self.target == "kubernetes":
                    instead = f"Name a secret of the cluster instead: launch.kubernetes.secrets.{secret}=SECRET/KEY"
                raise ValueError(
                    f"{field} has {secret}, which looks like a secret and would be written to scripts. {instead}; if "
                    "it is no secret, put the name into launch.not_secret"
                )
        return self

    @model_validator(mode="after")
    def _target_fits(self) -> LaunchConfig:
        if self.target in ("docker", "podman") and not self.container.image:
            raise ValueError(f"target is {self.target}, but container.image is not set. Name an image")
        if self.target == "local" and self.num_nodes > 1:
            raise ValueError("target is local, but num_nodes is more than 1. Use torchrun, deepspeed, slurm or sbatch")
        if self.target == "slurm" and self.container.runtime == "pyxis":
            raise ValueError(
                "target is slurm with container.runtime pyxis, whose container would hold submitit and could not queue "
                "the job again. Use target sbatch"
            )
        if self.target == "kubernetes":
            self._kubernetes_fits()
        if self.target == "skypilot" and self.gpus_per_node and not self.skypilot.accelerator:
            raise ValueError(
                f"target is skypilot with gpus_per_node {self.gpus_per_node}, but skypilot.accelerator is not set. "
                "Name the GPU, such as H100"
            )
        if self.sweep and self.target not in SWEEP_TARGETS:
            raise ValueError(f"target is {self.target}, but sweep makes a job array. Use target slurm or sbatch")
        needs_endpoint = self.target in ("torchrun", "docker", "podman") and self.num_nodes > 1
        if needs_endpoint and not self.rdzv_endpoint:
            raise ValueError(
                f"target is {self.target} with num_nodes {self.num_nodes}, but rdzv_endpoint is not set. Name the "
                "first node, HOST or HOST:PORT, and give the same command on each node"
            )
        if self.target == "deepspeed" and self.num_nodes > 1:
            if not self.hostfile and len(self.hosts) != self.num_nodes:
                raise ValueError(
                    f"target is deepspeed with num_nodes {self.num_nodes}, but hosts names {len(self.hosts)} and "
                    "hostfile is not set. Name every machine in hosts, or a hostfile"
                )
            if self.pass_env:
                raise ValueError(
                    "target is deepspeed on several nodes, whose launcher would write the variables of pass_env into "
                    "files and command lines. Set them on each machine, or use target torchrun"
                )
        return self

    def _kubernetes_fits(self) -> None:
        """Raises ValueError for what pods need and do not have, and for what has no place in them."""
        if not self.container.image:
            raise ValueError(
                "target is kubernetes, but container.image is not set. Name an image that has rwkv_cluster"
            )
        if not self.kubernetes.volumes:
            raise ValueError(
                "target is kubernetes, but kubernetes.volumes is not set. Name a claim that all pods share"
            )
        elsewhere = {
            "pass_env": "Name secrets of the cluster in launch.kubernetes.secrets, other values in launch.env",
            "setup": "Put what it does into the image",
            "container.mounts": "Name claims in launch.kubernetes.volumes",
            "container.extra_args": "Remove it",
        }
        values = (self.pass_env, self.setup, self.container.mounts, self.container.extra_args)
        for (field, remedy), value in zip(elsewhere.items(), values, strict=True):
            if value:
                raise ValueError(f"target is kubernetes, where {field} has no place. {remedy}")
        if self.prepare.own_job and self.kubernetes.kind != "jobset":
            raise ValueError(
                f"prepare.own_job is set, but kubernetes.kind is {self.kubernetes.kind}, and one Job cannot wait for "
                "another. Use kind jobset, or leave it out: rank 0 prepares while the others wait"
            )


def looks_secret(name: str) -> bool:
    """Whether an environment variable of this name holds what nobody else may read: by the words in it.

    GITHUB_PAT, dbPwd and OPENAI_KEY do; PATH, KEYBOARD and TOKENIZERS_PARALLELISM do not.
    """
    return any(_SECRET_PARTS.fullmatch(part.upper()) for part in _WORD_PART.findall(name))


def _check_word(field: str, value: str | None) -> str | None:
    rules = {
        "name": (_NAME, "letters, digits, dots, dashes and _, at most 100"),
        "comment": (_SENTENCE, "letters, digits, blanks and .,:;@/+=()-_"),
        "time": (_TIME, 'minutes, "H:MM:SS" or "D-HH:MM:SS"'),
        "mem": (_SIZE, "an amount such as 64G"),
        "rdzv_endpoint": (_ENDPOINT, "HOST or HOST:PORT"),
    }
    if field in ("python", "hostfile"):
        return _checked(value, re.compile(r"[^-].*"), field, "a path without `..`", path=True)
    pattern, expected = rules.get(field, (_WORD, "letters, digits and .,:;@/+=*|&[](){}-_ without blanks"))
    return _checked(value, pattern, field, expected)


def _checked(
    value: str | None, pattern: re.Pattern[str], field: str, expected: str, *, path: bool = False
) -> str | None:
    if value is None:
        return None
    _refuse_hidden(value, field)
    if not pattern.fullmatch(value) or (path and ".." in value.split("/")):
        raise ValueError(f"{field} is {value[:80]!a}. Use {expected}")
    return value


def _variable(name: str, field: str) -> None:
    if not _VARIABLE.fullmatch(name):
        raise ValueError(f"{field} has {name[:80]!a}, not the name of an environment variable. Use letters, digits, _")
    if _OURS.fullmatch(name):
        raise ValueError(f"{field} has {name}, which the launcher sets itself. Remove it")


def _refuse_hidden(text: str, field: str) -> None:
    if (character := hidden_character(text)) is not None:
        raise ValueError(f"{field} has {character}. Use visible characters only")
