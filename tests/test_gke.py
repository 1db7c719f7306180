"""The manifest for GKE: valid for Kubernetes and JobSet, and what it says is what a slice needs."""

import pytest
import yaml
from commands import command, real
from test_sweep import write_study

from experiments import gke
from mobilellm_jax.errors import UserError
from mobilellm_jax.training.signals import RESUME_ME

# Of the API jobset.x-k8s.io/v1alpha2, what the manifest uses, without the template of the job.
TEXT = {"type": "string"}
JOBSET = {
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {
            "required": ["name"],
            "properties": {"name": TEXT, "annotations": {"additionalProperties": TEXT}},
        },
        "spec": {
            "properties": {
                "failurePolicy": {
                    "properties": {
                        "maxRestarts": {"type": "integer"},
                        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate"]},
                        "rules": {
                            "type": "array",
                            "items": {
                                "required": ["action", "name"],
                                "properties": {
                                    "action": {
                                        "enum": [
                                            "FailJobSet",
                                            "RestartJobSet",
                                            "RestartJobSetAndIgnoreMaxRestarts",
                                        ]
                                    },
                                    "name": {"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "onJobFailureReasons": {
                                        "items": {
                                            "enum": [
                                                "BackoffLimitExceeded",
                                                "DeadlineExceeded",
                                                "FailedIndexes",
                                                "MaxFailedIndexesExceeded",
                                                "PodFailurePolicy",
                                            ]
                                        }
                                    },
                                },
                            },
                        },
                    }
                },
                "replicatedJobs": {
                    "type": "array",
                    "items": {
                        "required": ["name", "template"],
                        "properties": {
                            "name": TEXT,
                            "replicas": {"type": "integer"},
                            "template": {"required": ["spec"], "properties": {"spec": {}}},
                        },
                    },
                },
            }
        },
    },
}
PLACE = ["--image=eu/image:1", "--claim=results", "--workdir=/mnt/runs/mini"]


def closed(schema):
    """Returns a schema in which every object has the named properties only, as an API server is strict."""
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema:
        schema |= {"type": "object", "additionalProperties": False}
    return schema


def check(manifest):
    kubernetes = pytest.importorskip("kubernetes_validate", reason="needs pip install -e '.[test]'")
    import jsonschema

    jsonschema.validate(manifest, closed(JOBSET))
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
    kubernetes.validate(job, "1.33", strict=True)
    return replicated["template"]["spec"]


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path)


def test_a_slice_of_four_hosts(study):
    flags = ["--tpu=v6e", "--topology=4x4", "--spot", "--seeds=3", "--only=none,reverse", "--name=mini"]
    flags += ["--tasks=mobilellm", "--data_dir=/mnt/eval", "--limit=3"]
    flags += ["--config.train.batch_size=32", "--config.train.eval_batch_size=16"]
    result = command("experiments.gke", f"--config={study}", *PLACE, *flags)
    assert (result.returncode, result.stderr) == (0, "")
    manifest = yaml.safe_load(result.stdout)
    job = check(manifest)
    pod, policy = job["template"]["spec"], manifest["spec"]["failurePolicy"]
    (container,) = pod["containers"]

    # One pod on each host of one slice, all with the same command.
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == 1
    topology = manifest["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert topology == "cloud.google.com/gke-nodepool"
    assert container["command"] == [
        *("python", "-m", "experiments.sweep", f"--config={study}", "--config.train.batch_size=32"),
        *("--config.train.eval_batch_size=16", "--workdir=/mnt/runs/mini", "--only=none,reverse"),
        *("--seeds=3", "--tasks=mobilellm", "--data_dir=/mnt/eval", "--limit=3"),
        *("--distributed", "--start_timeout=900"),
    ]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    chips = {"google.com/tpu": 4}
    assert container["resources"] == {"requests": chips, "limits": chips}
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert (volume["name"], mount["mountPath"]) == (mount["name"], "/mnt/runs")

    # Status 75 and a lost node start all again and do not count; other failures count.
    assert (pod["restartPolicy"], job["backoffLimit"]) == ("Never", 0)
    fails_job = job["podFailurePolicy"]["rules"]
    assert {rule["action"] for rule in fails_job} == {"FailJob"}
    assert [rule["onExitCodes"]["values"] for rule in fails_job if "onExitCodes" in rule] == [[RESUME_ME]]
    assert fails_job[1]["onExitCodes"]["containerName"] == container["name"]
    assert fails_job[0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (10, "BlockingRecreate")
    assert pod["terminationGracePeriodSeconds"] >= 120


def test_a_training_on_one_host():
    flags = ["--run=train", "--config=configs/mobilellm.py:125m", "--config.train.batch_size=64"]
    result = real("experiments.gke", *flags, *PLACE, "--topology=2x4", "--chips_per_host=8")
    assert (result.returncode, result.stderr) == (0, "")
    manifest = yaml.safe_load(result.stdout)
    job = check(manifest)
    (container,) = job["template"]["spec"]["containers"]
    assert manifest["metadata"]["name"] == "mobilellm-py-125m"
    assert (job["parallelism"], container["resources"]["limits"]) == (1, {"google.com/tpu": 8})
    assert container["command"] == [
        *("python", "-m", "experiments.train", "--config=configs/mobilellm.py:125m"),
        *("--config.train.batch_size=64", "--workdir=/mnt/runs/mini"),
    ]


def test_the_check_finds_what_is_wrong():
    jsonschema = pytest.importorskip("jsonschema")
    wrong = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": "x"}}
    for spec in ({"replicatedJob": []}, {"failurePolicy": {"rules": [{"action": "Restart", "name": "x"}]}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**wrong, "spec": spec}, closed(JOBSET))


@pytest.mark.parametrize(
    ("tpu", "topology", "chips_per_host", "expected"),
    [
        ("v5e", "1x1", None, (1, 1)),
        ("v5e", "2x2", None, (1, 4)),
        ("v5e", "2x4", None, (2, 4)),
        ("v5e", "2x4", 8, (1, 8)),
        ("v5e", "16x16", None, (64, 4)),
        ("v4", "2x2x4", None, (4, 4)),
    ],
)
def test_hosts_of_a_slice(tpu, topology, chips_per_host, expected):
    assert gke.hosts_of(tpu, topology, chips_per_host) == expected


@pytest.mark.parametrize(
    ("tpu", "topology", "chips_per_host", "message"),
    [
        ("v5e", "", None, "--topology=: expected 2 sizes for v5e, such as 4x4"),
        ("v5e", "2x2x4", None, "expected 2 sizes"),
        ("v5p", "4x4", None, "expected 3 sizes for v5p, such as 2x2x4"),
        ("v5e", "0x4", None, "expected 2 sizes"),
        ("v5e", "2x3", None, "6 chips do not divide by --chips_per_host=4"),
    ],
)
def test_slices_that_are_not_there(tpu, topology, chips_per_host, message):
    with pytest.raises(UserError, match=message):
        gke.hosts_of(tpu, topology, chips_per_host)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--topology=4x4", "--workdir=/elsewhere"],
            "--workdir=/elsewhere: is outside the volume of --claim",
        ),
        (["--topology=4x4", "--workdir=gs://b/x"], "leave it out; --workdir is in a bucket"),
        (["--topology=4x4", "--name=My_Runs"], "--name=My_Runs: expected at most 40 lower-case letters"),
        (["--topology=4x4", "--config.mesh.tensor=3"], "mesh: data=-1, fsdp=1, tensor=3 does not fill 16"),
        (["--topology=4x4", "--status"], "--status: leave it out; python -m experiments.sweep --status"),
        (["--topology=4x4", "--devices_per_run=1"], "--devices_per_run=1: needs a slice of one host"),
        (["--topology=4x4", "--quantize=w5:7"], "scheme 'w5:7': groups of 7 do not divide"),
        (["--topology=4x4", "--num_repeats=two"], "--num_repeats=two: 'two' is not valid"),
        (["--topology=4x4", "--trials_per_program=0"], "--trials_per_program=0: expected auto"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit(study, flags, message):
    config = [f"--config={study}", "--config.train.batch_size=16", "--config.train.eval_batch_size=16"]
    result = command("experiments.gke", *config, *PLACE, *flags)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    assert message in result.stderr
