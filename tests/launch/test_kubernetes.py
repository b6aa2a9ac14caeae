"""Target kubernetes and skypilot: the manifests, by the published schemas; what pods agree on; what kubectl is told."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubectl_stub import KubectlStub

from rwkv_cluster import cli
from rwkv_cluster.config import Config
from rwkv_cluster.errors import ConfigError, LaunchError
from rwkv_cluster.launch import jobs, meeting
from rwkv_cluster.launch.launch_folder import KUBERNETES
from rwkv_cluster.launch.launchers.kubernetes_manifests import quantity
from rwkv_cluster.launch.launchers.launcher import Plan
from rwkv_cluster.launch.logs import Echo
from rwkv_cluster.launch.plan import plan
from rwkv_cluster.launch.preflight import BadNode

OLDEST, NEWEST = "1.29", "1.37"  # older schemas wrongly ask for onPodConditions in each rule
KINDS = ("job", "jobset", "pytorchjob")
FULL: dict[str, Any] = {
    "name": "Base_3b",
    "num_nodes": 3,
    "gpus_per_node": 8,
    "cpus_per_node": 64,
    "mem": "500G",
    "signal_s": 90,
    "env": {"NCCL_DEBUG": "INFO", "WORDS": "it's $HOME $(HOME)"},
    "container": {"image": "registry.org/rwkv:1", "shm_size": "32g"},
    "kubernetes": {
        "volumes": ["shared-fs:/shared", "data:/data:ro"],
        "secrets": {"WANDB_API_KEY": "wandb/api-key"},
        "pull_secrets": ["registry"],
        "run_as": "1000:2000",
        "resources": {"rdma/hca": 1},
        "node_selector": {"gpu": "h100"},
        "tolerations": ["nvidia.com/gpu"],
        "priority_class": "low",
        "queue": "research",
    },
}


def planned(kind: str = "job", work_dir: str = "/shared/me/base", cwd: str = "/home/me", **launch: Any) -> Plan:
    kubernetes = {**FULL["kubernetes"], "kind": kind, **launch.pop("kubernetes", {})}
    values = {"target": "kubernetes", **FULL, "kubernetes": kubernetes, **launch}
    return plan(Config(work_dir=work_dir, launch=values), Path(cwd))


def objects(made: Plan) -> dict[str, Any]:
    """The manifests by their kinds."""
    return {document["kind"]: document for document in yaml.safe_load_all(made.files["job.yaml"])}


def training_pods(made: Plan) -> list[Any]:
    """Pod templates of the nodes."""
    found = objects(made)
    if "Job" in found:
        return [found["Job"]["spec"]["template"]]
    if "JobSet" in found:
        return [found["JobSet"]["spec"]["replicatedJobs"][-1]["template"]["spec"]["template"]]
    return [replica["template"] for replica in found["PyTorchJob"]["spec"]["pytorchReplicaSpecs"].values()]


def require_valid(made: Plan) -> None:
    """Kubernetes' own objects, and the pods and jobs in those of others, as the schemas of two versions have them."""
    found = objects(made)
    own = [found[kind] for kind in ("ConfigMap", "Service", "Job") if kind in found]
    if "JobSet" in found:
        specs = [job["template"]["spec"] for job in found["JobSet"]["spec"]["replicatedJobs"]]
        own += [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec} for spec in specs]
    own += [{"apiVersion": "v1", "kind": "Pod", **pod} for pod in training_pods(made) if "PyTorchJob" in found]
    for each in own:
        for version in (OLDEST, NEWEST):
            kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_manifests_fit_the_published_schemas(kind: str) -> None:
    require_valid(planned(kind, prepare={"own_job": kind == "jobset", "mem": "16G"}))
    require_valid(planned(kind, requeue=False, num_nodes=1, gpus_per_node=None, ranks_per_node=2, mem=None))


def test_the_schemas_refuse_what_no_manifest_has() -> None:
    made = objects(planned())["Job"]
    made["spec"]["template"]["spec"]["containers"][0]["resouces"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="resouces"):
        kubernetes_validate.validate(made, NEWEST, strict=True)


@pytest.mark.system  # seconds of imports
def test_what_operators_define_fits_their_own_models() -> None:
    """Each field comes back from the published model of JobSet and of PyTorchJob; an unknown one does not."""
    from kubeflow.training.api_client import ApiClient
    from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

    jobset = objects(planned("jobset", prepare={"own_job": True}))["JobSet"]
    assert JobsetV1alpha2JobSet.from_dict(jobset).to_dict() == jobset
    pytorchjob = objects(planned("pytorchjob"))["PyTorchJob"]
    client = ApiClient()

    def as_modelled(document: dict[str, Any]) -> Any:
        answer = type("Answer", (), {"data": json.dumps(document)})
        return client.sanitize_for_serialization(client.deserialize(answer, "KubeflowOrgV1PyTorchJob"))

    assert as_modelled(pytorchjob) == pytorchjob
    jobset["spec"]["netwrk"] = {}
    assert JobsetV1alpha2JobSet.from_dict(jobset).to_dict() != jobset
    pytorchjob["spec"]["runPolice"] = {}
    assert as_modelled(pytorchjob) != pytorchjob


def test_a_pod_is_a_node_with_what_was_asked_for() -> None:
    found = objects(planned())
    job = found["Job"]["spec"]
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 3, 3)
    pod, name = job["template"]["spec"], found["Job"]["metadata"]["name"]
    assert re.fullmatch(r"base-3b-[0-9a-f]{8}", name)
    assert found["Service"]["metadata"]["name"] == pod["subdomain"] == name
    assert found["Service"]["spec"]["selector"] == job["template"]["metadata"]["labels"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"rdma/hca": "1", "nvidia.com/gpu": "8", "memory": "500Gi"}
    assert container["resources"]["requests"] == {"cpu": "64", "memory": "500Gi"}
    env = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}
    assert env["RWKV_CLUSTER_NODES"].split() == [f"{name}-{node}.{name}" for node in range(3)]
    assert env["WANDB_API_KEY"] == {"secretKeyRef": {"name": "wandb", "key": "api-key"}}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    mounts = {mount["mountPath"]: (mount["name"], mount.get("readOnly", False)) for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"] == ("shared-memory", False)
    claims = {path: volumes[volume].get("persistentVolumeClaim") for path, (volume, _) in mounts.items()}
    assert (claims["/shared"], claims["/data"]) == ({"claimName": "shared-fs"}, {"claimName": "data"})
    assert (mounts["/shared"][1], mounts["/data"][1]) == (False, True)
    assert pod["terminationGracePeriodSeconds"] == 90
    assert pod["securityContext"] == {"runAsUser": 1000, "runAsGroup": 2000, "fsGroup": 2000}
    assert found["Job"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert Config(**yaml.safe_load(found["ConfigMap"]["data"]["config.yaml"])).launch.name == "Base_3b"


def test_a_mistake_ends_the_job_and_a_node_that_is_taken_away_counts_for_nothing() -> None:
    job = objects(planned())["Job"]["spec"]
    rules = job["podFailurePolicy"]["rules"]
    codes = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in rules]
    assert codes == [("FailJob", [2, 3, 4, 5, 6, 75]), ("Ignore", None), ("Ignore", [143])]
    assert rules[1]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert job["backoffLimit"] == 9  # three failures of three pods each
    once = objects(planned(requeue=False))["Job"]["spec"]
    assert (once["backoffLimit"], "podFailurePolicy" in once) == (0, False)
    assert "--restart-code" not in once["template"]["spec"]["containers"][0]["args"]
    jobset = objects(planned("jobset"))["JobSet"]["spec"]
    assert jobset["failurePolicy"]["maxRestarts"] == 3
    assert jobset["replicatedJobs"][0]["template"]["spec"]["backoffLimit"] == 0


def test_data_preparation_of_its_own_has_no_gpus_and_comes_first() -> None:
    prepare, train = objects(planned("jobset", prepare={"own_job": True}))["JobSet"]["spec"]["replicatedJobs"]
    assert train["dependsOn"] == [{"name": prepare["name"], "status": "Complete"}]
    (container,) = prepare["template"]["spec"]["template"]["spec"]["containers"]
    assert container["resources"] == {"requests": {"cpu": "4"}}
    assert container["args"][-2:] == ["prepare", "/etc/rwkv-cluster/config.yaml"]


@pytest.mark.parametrize(("kind", "first"), [("jobset", "{}-train-0-0.{}"), ("pytorchjob", "{}-master-0")])
def test_the_ranks_meet_where_the_operator_puts_the_first_node(kind: str, first: str) -> None:
    made = planned(kind)
    name = objects(made)["ConfigMap"]["metadata"]["name"]
    for pod in training_pods(made):
        env = {entry["name"]: entry.get("value") for entry in pod["spec"]["containers"][0]["env"]}
        assert env["RWKV_CLUSTER_NODES"].split()[0] == first.format(name, name)


def as_kubelet_expands(text: str) -> str:
    """$(NAME) is a variable, $$ a dollar, as Kubernetes documents it for arguments and values."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda match: "$" if match[0] == "$$" else "EXPANDED", text)


@pytest.mark.parametrize("payload", ["$(HOME)", "$$(HOME)", "$HOME", "a: b", "'\"", "- x", "é", "yes", "0x10", "# a"])
def test_what_stands_in_the_file_arrives_as_it_is(payload: str) -> None:
    made = planned(env={"VALUE": payload}, python=f"/opt/{payload}")
    (container,) = training_pods(made)[0]["spec"]["containers"]
    (value,) = (entry["value"] for entry in container["env"] if entry["name"] == "VALUE")
    assert as_kubelet_expands(value) == payload
    assert as_kubelet_expands(container["args"][0]) == f"/opt/{payload}"


@pytest.mark.parametrize(
    ("launch", "sentence"),
    [
        ({"container": {}}, "container.image is not set"),
        ({"kubernetes": {"volumes": []}}, "kubernetes.volumes is not set"),
        ({"setup": ["module load cuda"]}, "setup has no place"),
        ({"pass_env": ["HF_TOKEN"]}, "Name secrets of the cluster in launch.kubernetes.secrets"),
        ({"env": {"HF_TOKEN": "hf_x"}}, "launch.kubernetes.secrets.HF_TOKEN=SECRET/KEY"),
        ({"prepare": {"own_job": True}}, "one Job cannot wait for another"),
        ({"sweep": [{"training.random_seed": 1}]}, "sweep makes a job array"),
        ({"kubernetes": {"volumes": ["a:/x", "b:/x/"]}}, "two volumes at /x"),
        ({"kubernetes": {"volumes": ["a:/x/../y"]}}, "volumes has"),
        ({"kubernetes": {"volumes": ["a:/dev/shm"]}}, "mounts a claim at /dev/shm"),
        ({"kubernetes": {"gpu_resource": "gpu"}}, "gpu_resource has 'gpu'"),
        ({"kubernetes": {"context": "--kubeconfig=x"}}, "context has"),
        ({"kubernetes": {"namespace": "a/b"}}, "namespace has"),
        ({"kubernetes": {"resources": {"memory": 4}}}, "resources has memory"),
        ({"kubernetes": {"volumes": ["data:/shared:ro"]}}, "lies in no volume that pods may write"),
    ],
)
def test_what_pods_cannot_do_is_refused(launch: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        planned(**launch)


def test_a_literal_secret_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match=r"secrets\.HF_TOKEN is no reference") as refused:
        planned(kubernetes={"secrets": {"HF_TOKEN": "hf_abcdef"}})
    assert "hf_abcdef" not in str(refused.value)


def test_an_input_that_is_here_and_in_no_volume_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("{}")
    launch = {"target": "kubernetes", **FULL}
    config = Config(work_dir="/shared/w", data={"inputs": ["text.jsonl"]}, launch=launch)
    with pytest.raises(ConfigError, match=f"data.inputs has text.jsonl, which is {tmp_path}/text.jsonl here"):
        plan(config, tmp_path)


def test_amounts_are_powers_of_1024_as_for_slurm_and_docker() -> None:
    assert [quantity("64G"), quantity("16g"), quantity("512", "Mi"), quantity("1tb")] == [
        "64Gi",
        "16Gi",
        "512Mi",
        "1Ti",
    ]


def test_nodes_meet_for_each_start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come back later do not join the start before."""
    monkeypatch.setattr(meeting, "POLL_S", 0.01)

    def start() -> set[str]:
        found: list[str] = []
        nodes = [threading.Thread(target=lambda n=n: found.append(meeting.meet(tmp_path, n, "abc"))) for n in (2, 0, 1)]
        for node in nodes:
            node.start()
        for node in nodes:
            node.join(20)
        assert len(found) == 3
        return set(found)

    first, second = start(), start()
    assert len(first) == len(second) == 1
    assert first != second


def test_a_node_that_has_not_come_back_is_named_and_who_waited_is_not_counted_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RWKV_CLUSTER_MEET_S", "0.1")
    monkeypatch.setattr(meeting, "POLL_S", 0.01)
    with pytest.raises(BadNode, match="b has not started after"):
        meeting.meet(tmp_path, 0, ("a", "b"))
    with pytest.raises(BadNode, match="a has not said in"):
        meeting.meet(tmp_path, 1, ("a", "b"))
    assert list((tmp_path / ".state/meeting").iterdir()) == []


@pytest.mark.parametrize("number", ["2", "x", "-1"])
def test_a_node_needs_its_number(number: str, tmp_path: Path) -> None:
    environment = {"N": number, "RWKV_CLUSTER_NODES": "a b", "RWKV_CLUSTER_LAUNCH": str(tmp_path)}
    with pytest.raises(LaunchError, match=f"N is '{number}', expected a number below 2"):
        meeting.join(environment, "N")
    with pytest.raises(LaunchError, match="OTHER is not set"):
        meeting.join(environment, "OTHER")


def test_ranks_are_echoed_by_whole_lines_from_this_start_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank-1.log").write_text("an earlier start\n")
    echo = Echo(tmp_path, (0, 1))
    with open(tmp_path / "rank-1.log", "a") as log:
        log.write("one\ntw")
    echo.copy()
    with open(tmp_path / "rank-1.log", "a") as log:
        log.write("o\n")
    echo.copy()
    assert capsys.readouterr().out == "[rank 1] one\n[rank 1] two\n"


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KubectlStub:
    """A stand-in for kubectl, first in PATH, which writes down how it is called and says what it is told to."""
    return KubectlStub(tmp_path / "kubectl", monkeypatch)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run whose work directory is in a volume of the pods."""
    path = tmp_path / "run.yaml"
    kubernetes = {"volumes": [f"shared-fs:{tmp_path}"], "context": "lab", "namespace": "me"}
    launch = {"target": "kubernetes", "num_nodes": 2, "ranks_per_node": 2, "container": {"image": "rwkv:1"}}
    path.write_text(json.dumps({"work_dir": str(tmp_path / "work"), "launch": {**launch, "kubernetes": kubernetes}}))
    return path


WHERE = ["--context=lab", "--namespace=me"]


def test_a_dry_run_prints_what_is_submitted_and_needs_no_kubectl(
    run_file: Path, kubectl: KubectlStub, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["launch", str(run_file), "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert not kubectl.calls()
    assert not (tmp_path / "work").exists()
    assert cli.main(["launch", str(run_file)]) == 0
    said = capsys.readouterr().out
    (folder,) = (tmp_path / "work/launch").iterdir()
    assert (folder / "job.yaml").read_text() == dry
    name = json.loads((folder / KUBERNETES).read_text())["name"]
    assert [line.split()[0] for line in said.splitlines()] == ["job", "launch", "status", "logs", "cancel"]
    assert said.splitlines()[0] == f"job     {name}"
    ours = f"--selector=rwkv-cluster/run={name}"
    assert kubectl.calls() == [
        [*WHERE, "get", "jobs.batch", name, "--ignore-not-found", "--output=json"],
        [*WHERE, "delete", "jobs.batch,services,configmaps", ours, "--ignore-not-found", "--wait=true"],
        [*WHERE, "create", "--filename=job.yaml"],
    ]
    assert kubectl.folders()[-1] == str(folder)


def test_a_work_dir_whose_job_goes_on_is_refused(
    run_file: Path, kubectl: KubectlStub, capsys: pytest.CaptureFixture[str]
) -> None:
    kubectl.says("get", {"metadata": {}, "status": {"active": 2}})
    assert cli.main(["launch", str(run_file)]) == 6
    assert "has not ended. Wait for it, or end it: `rwkv-cluster cancel" in capsys.readouterr().err
    kubectl.says("get", {"metadata": {}, "status": {"conditions": [{"type": "Failed", "status": "True"}]}})
    assert cli.main(["launch", str(run_file)]) == 0


def test_what_a_cluster_refuses_is_taken_back_and_told(
    run_file: Path, kubectl: KubectlStub, capsys: pytest.CaptureFixture[str]
) -> None:
    kubectl.fails("create", 'Error from server (Forbidden): error when creating "job.yaml": exceeded quota')
    assert cli.main(["launch", str(run_file)]) == 6
    assert capsys.readouterr().err.splitlines()[-1] == (
        'rwkv-cluster: error: kubectl create failed: Error from server (Forbidden): error when creating "job.yaml": '
        "exceeded quota. If that is not the cluster that you mean, look at launch.kubernetes.context and namespace"
    )
    assert [call[2] for call in kubectl.calls()] == ["get", "delete", "create", "delete"]


def test_kubectl_that_is_not_here_or_reaches_nothing_is_one_sentence(
    run_file: Path, kubectl: KubectlStub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "The connection to the server localhost:8080 was refused - did you specify the right host or port?"
    kubectl.fails("get", f'E1128 10:07:33.2 8421 memcache.go:265] "Unhandled Error"\n{said}\n')
    assert cli.main(["launch", str(run_file)]) == 6
    assert capsys.readouterr().err.splitlines() == [
        f"rwkv-cluster: error: kubectl get failed: {said}. If that is not the cluster that you mean, look at "
        "launch.kubernetes.context and namespace"
    ]
    monkeypatch.setenv("PATH", "/absent")
    assert cli.main(["launch", str(run_file)]) == 6
    assert capsys.readouterr().err.splitlines() == [
        "rwkv-cluster: error: kubectl is not here. Install it, or use a machine that has it"
    ]


def pod(index: int, phase: str, **status: Any) -> dict[str, Any]:
    return {"metadata": {"name": f"rwkv-{index}-abcde"}, "status": {"phase": phase, **status}}


def launched(folder: Path) -> Path:
    launch = folder / "work/launch/1"
    launch.mkdir(parents=True)
    (launch / "command.json").write_text('{"target": "kubernetes"}')
    (launch / KUBERNETES).write_text('{"kind": "job", "name": "rwkv", "context": null, "namespace": null}')
    return launch


def test_the_state_is_that_of_the_object_and_its_pods(tmp_path: Path, kubectl: KubectlStub) -> None:
    folder = launched(tmp_path)
    assert jobs.status(folder).has_ended  # the cluster has none
    kubectl.says("get", {"metadata": {}, "status": {"active": 2}})
    waiting = {"type": "PodScheduled", "status": "False", "message": "0/4 nodes have nvidia.com/gpu"}
    kubectl.says("get pods", {"items": [pod(1, "Pending", conditions=[waiting]), pod(0, "Running")]})
    status = jobs.status(folder)
    assert (status.state, status.has_ended) == ("Running", False)
    assert status.detail == "job rwkv, 1 Pending, 1 Running, rwkv-1-abcde: 0/4 nodes have nvidia.com/gpu"
    no_image = {"state": {"waiting": {"reason": "ErrImagePull"}}}
    kubectl.says("get pods", {"items": [pod(0, "Pending", containerStatuses=[no_image])]})
    status = jobs.status(folder)
    assert (status.state, status.detail) == ("Pending", "job rwkv, 1 Pending, rwkv-0-abcde: ErrImagePull")
    kubectl.says("get", {"metadata": {"deletionTimestamp": "now"}, "status": {}})
    assert jobs.status(folder).state == "Terminating"
    failed = {"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "exit code 3"}
    kubectl.says("get", {"metadata": {}, "status": {"conditions": [failed]}})
    ended = {"state": {"terminated": {"exitCode": 3, "message": "...\nrwkv-cluster: rank 0 failed (data): x\n"}}}
    kubectl.says("get pods", {"items": [pod(0, "Failed", containerStatuses=[ended])]})
    status = jobs.status(folder)
    assert (status.state, status.has_ended) == ("Failed", True)
    said = "rwkv-0-abcde: exit code 3, rwkv-cluster: rank 0 failed (data): x"
    assert status.detail == f"job rwkv, 1 Failed, {said}, PodFailurePolicy exit code 3"


LINES = """\
[pod/rwkv-0-a/main] 2026-01-01T00:00:01.5Z torchrun says
[pod/rwkv-0-a/main] 2026-01-01T00:00:02.5Z [rank 0] step 1
error: a pod waits
[pod/rwkv-1-b/main] 2026-01-01T00:00:01.7Z [rank 2] loaded
[pod/rwkv-1-b/main] 2026-01-01T00:00:01.8Z\x20
"""


def test_logs_are_the_pods_of_one_rank_or_of_the_first_and_the_launchers(tmp_path: Path, kubectl: KubectlStub) -> None:
    folder = launched(tmp_path)
    kubectl.prints("logs", LINES)
    assert jobs.logs(folder, None) == "torchrun says\nstep 1\n\n"
    assert jobs.logs(folder, 2) == "loaded\n"
    with pytest.raises(LaunchError, match="rank 5 has not started"):
        jobs.logs(folder, 5)
    assert "".join(jobs.follow(folder, 0)) == "step 1\n"


def test_what_was_read_is_not_read_again(tmp_path: Path, kubectl: KubectlStub) -> None:
    from rwkv_cluster.launch.launchers.kubernetes import Kubernetes

    reader = Kubernetes().logs([launched(tmp_path)], 0)
    kubectl.prints("logs", LINES)
    assert list(reader.read()) == ["step 1\n"]
    kubectl.prints("logs", LINES + "[pod/rwkv-0-a/main] 2026-01-01T00:00:03Z [rank 0] step 2\n")
    assert list(reader.read()) == ["step 2\n"]
    assert "--since=60s" in kubectl.calls()[-1]


def test_cancel_deletes_and_kills_only_when_it_is_told_to(tmp_path: Path, kubectl: KubectlStub) -> None:
    folder = launched(tmp_path)
    running = {"metadata": {}, "status": {"active": 1}}
    kubectl.says("get", running)
    kubectl.says("get pods", {"items": []})
    kubectl.ends_after_delete()
    assert jobs.cancel(folder, grace_s=5).state == "ended"
    deletions = [call for call in kubectl.calls() if call[0] == "delete"]
    assert [call[1] for call in deletions] == ["jobs.batch,services,configmaps"]
    assert {"--cascade=foreground", "--wait=false"} <= set(deletions[0])
    kubectl.says("get", running)
    assert jobs.cancel(folder, grace_s=0).state == "ended"
    assert [call[1] for call in kubectl.calls() if call[0] == "delete"][-1] == "pods"


RECORDS = ["{", "[]", '{"kind": "job"}', '{"kind": "x", "name": "a"}']
RECORDS += ['{"kind": "job", "name": "--all"}', '{"kind": "job", "name": 5}']


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_that_is_not_the_launchers_reaches_no_kubectl(
    record: str, tmp_path: Path, kubectl: KubectlStub
) -> None:
    folder = launched(tmp_path)
    (folder / KUBERNETES).write_text(record)
    for act in (jobs.status, lambda folder: jobs.logs(folder, None), lambda folder: jobs.cancel(folder, grace_s=0)):
        with pytest.raises(LaunchError):
            act(folder)
    assert not kubectl.calls()


def sky(**launch: Any) -> Any:
    values = {"target": "skypilot", "num_nodes": 2, "gpus_per_node": 8, "pass_env": ["HF_TOKEN"], **launch}
    values.setdefault("skypilot", {"accelerator": "H100", "volumes": ["vol:/work"]})
    return yaml.safe_load(plan(Config(work_dir="/work/base", launch=values), Path("/home/me")).files["task.yaml"])


def test_a_task_of_skypilots_names_machines_volumes_and_secrets() -> None:
    task = sky(setup=["module load cuda"], container={"image": "rwkv:1"})
    assert task["resources"] == {"accelerators": "H100:8", "image_id": "docker:rwkv:1"}
    assert (task["num_nodes"], task["volumes"], task["secrets"]) == (2, {"/work": "vol"}, {"HF_TOKEN": None})
    assert Config(**yaml.safe_load(task["envs"]["RWKV_CLUSTER_CONFIG"])).work_dir == "/work/base"
    assert "eval -- 'module load cuda' || exit 6" in task["run"].splitlines()
    with pytest.raises(ConfigError, match="no volume that the 2 machines share"):
        sky(skypilot={"accelerator": "H100"})
    with pytest.raises(ConfigError, match=r"skypilot\.accelerator is not set"):
        sky(skypilot={})


def test_skypilot_is_printed_and_not_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"work_dir": str(tmp_path / "work"), "launch": {"target": "skypilot"}}))
    assert cli.main(["launch", str(path), "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["name"] == "rwkv"
    assert cli.main(["launch", str(path)]) == 6
    assert "Add --dry-run > task.yaml" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
