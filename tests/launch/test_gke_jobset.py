"""launch/gke_jobset.sh: what it renders is a JobSet, by its API's models, and holds a Job of Kubernetes' schema."""

from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from .conftest import TRAIN, Shell

OPTIONS = ["--name", "irc", "--topology", "v5e:4x4", "--image", "registry/popax:1", "--bucket", "my-bucket"]


def strict_schema() -> dict[str, Any]:
    """The JobSet's schema, where an unknown key is an error as it is for the API server."""
    schema = JobsetV1alpha2JobSet.model_json_schema()
    for model in (schema, *schema["$defs"].values()):
        if "properties" in model:
            model["additionalProperties"] = False
    # In the API a string or a number; the generated model is a class of its own around it.
    schema["$defs"]["IoK8sApimachineryPkgApiResourceQuantity"] = {"type": ["string", "number"]}
    return schema


def rendered(shell: Shell, *words: str) -> dict[str, Any]:
    result = shell.run("gke_jobset.sh", *OPTIONS, *words, "--dry-run", *TRAIN)
    assert result.returncode == 0, result.stderr
    manifest, command = result.stdout.split("---\n")
    assert command == "# kubectl apply -f -\n"
    assert "@" not in manifest.partition("apiVersion")[2]
    return yaml.safe_load(manifest)


def job_of(jobset: dict[str, Any]) -> dict[str, Any]:
    [slice_] = jobset["spec"]["replicatedJobs"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **slice_["template"]}


@pytest.mark.parametrize(
    "words",
    [(), ("--spot", "--slices", "4", "--max_restarts", "0", "--namespace", "team", "--service_account", "popax")],
)
def test_it_is_valid(shell, words):
    jobset = rendered(shell, *words)
    Draft202012Validator(strict_schema()).validate(jobset)
    kubernetes_validate.validate(job_of(jobset), "1.34", strict=True)


def test_the_schemas_refuse_what_is_wrong(shell):
    """Else the test above proves nothing."""
    jobset = rendered(shell)
    validator = Draft202012Validator(strict_schema())
    assert not validator.is_valid({**jobset, "spec": {**jobset["spec"], "restarts": 3}})
    jobset["spec"]["replicatedJobs"][0]["replicas"] = "one"
    assert not validator.is_valid(jobset)
    job = job_of(jobset)
    job["spec"]["template"]["spec"]["gracePeriod"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.34", strict=True)


@pytest.mark.parametrize(
    ("topology", "words", "accelerator", "hosts", "chips"),
    [
        ("v5p:4x4x2", (), "tpu-v5p-slice", 8, 4),
        ("v5e:4x4", (), "tpu-v5-lite-podslice", 4, 4),
        ("v6e:2x4", ("--chips_per_host", "8"), "tpu-v6e-slice", 1, 8),
        ("v5e:1x1", (), "tpu-v5-lite-podslice", 1, 1),
        ("v4:2x2x4", (), "tpu-v4-podslice", 4, 4),
        ("tpu7x:2x2x2", (), "tpu7x", 2, 4),
    ],
)
def test_a_slice_has_its_hosts_and_chips(shell, topology, words, accelerator, hosts, chips):
    jobset = rendered(shell, "--topology", topology, *words)
    job = job_of(jobset)["spec"]
    assert job["completions"] == job["parallelism"] == hosts
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
    }
    [container] = pod["containers"]
    wanted = {"google.com/tpu": str(chips)}
    assert container["resources"] == {"requests": wanted, "limits": wanted}


def test_pods_have_time_to_save_and_a_failure_starts_all_again(shell):
    jobset = rendered(shell, "--grace", "300", "--max_restarts", "7", "--spot")
    job = job_of(jobset)["spec"]
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert pod["containers"][0]["args"] == [*TRAIN[1:], "--distributed"]
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"


def test_arguments_arrive_whole(shell):
    prompt = r'say "hi" \n @NAME@ & {x: [1]} # no comment'
    result = shell.run("gke_jobset.sh", *OPTIONS, "--dry-run", "--", "generate", "--prompt", prompt)
    manifest = yaml.safe_load(result.stdout.split("---\n")[0])
    args = job_of(manifest)["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args == ["generate", "--prompt", prompt, "--distributed"]


def test_kubectl_is_given_what_dry_run_prints(shell):
    expected = shell.run("gke_jobset.sh", *OPTIONS, "--dry-run", *TRAIN).stdout.split("---\n")[0]
    shell.add("kubectl", "cat > applied")
    result = shell.run("gke_jobset.sh", *OPTIONS, *TRAIN)
    assert result.returncode == 0, result.stderr
    assert shell.calls() == ["kubectl apply -f -"]
    assert (shell.folder / "applied").read_text() == expected
    shell.run("gke_jobset.sh", "--name", "irc", "--delete")
    assert shell.calls()[-1] == "kubectl delete jobset irc --namespace=default"
