"""Print a JobSet that runs a study or a training on a TPU slice of Google Kubernetes Engine.

  python -m experiments.gke --config=configs/layer_sharing.py:small --tpu=v5e --topology=4x4 \
      --image=IMAGE --claim=CLAIM --workdir=/mnt/runs | kubectl apply -f -
  python -m experiments.gke --run=train --config=configs/mobilellm.py:125m --workdir=/mnt/runs/125m ...

Every host of the slice runs the same command, with --distributed where there are several. The working
directory of the image is this repository, with `.[tpu]` installed. The claim is a PersistentVolumeClaim that
all hosts can write (ReadWriteMany, such as Filestore), mounted at --mount, under which --workdir lies. Or
--workdir is gs://bucket/folder, without a claim; then the image has `.[tpu,gcs]`, and its pods a service
account that may write there. The cluster needs the JobSet controller and a node pool of this topology.

A host that is to go gets SIGTERM, and the run ends with a checkpoint and status 75 on all hosts: that starts
them again, as often as it takes. So does the loss of a node. Any other failure starts them again at most 10
times. The output is checked against the schemas of Kubernetes and JobSet, and was not tried on a cluster.
"""

import math
import re
from pathlib import PurePosixPath
from typing import Any

import yaml
from absl import flags
from jax.sharding import AbstractMesh, AxisType

from experiments import cli
from experiments.runner import after, hosts
from experiments.runner.flags import (
    DEFAULT_STUDY,
    PASSED_ON,
    asked_loops,
    asked_points,
    asked_schemes,
    asked_trials,
    define_sweep,
    refuse_listing,
)
from experiments.runner.studies import shard
from mobilellm_jax.config import Config, from_config_dict
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import partition
from mobilellm_jax.training.signals import RESUME_ME

FLAGS = flags.FLAGS

# What GKE calls the accelerator, and the dimensions of a topology.
_TPUS = {
    "v4": ("tpu-v4-podslice", 3),
    "v5e": ("tpu-v5-lite-podslice", 2),
    "v5p": ("tpu-v5p-slice", 3),
    "v6e": ("tpu-v6e-slice", 2),
}
_GRACE_S = 300  # to save a checkpoint; GKE gives a spot node less
_START_S = 900  # for the slowest host to fetch the image
_RESTARTS = 10


def define_flags() -> None:
    flags.DEFINE_enum("tpu", "v5e", list(_TPUS), "generation of the TPU")
    flags.DEFINE_string("topology", None, "of the slice, such as 4x4, or 2x2x4 on v4 and v5p")
    flags.DEFINE_integer("chips_per_host", None, "default: 4, and 1 for a topology of 1x1", 1, 8)
    flags.DEFINE_string("image", None, "container image with this repository")
    flags.DEFINE_string("claim", None, "PersistentVolumeClaim for the results")
    flags.DEFINE_string("mount", "/mnt/runs", "where the claim is mounted")
    flags.DEFINE_string("name", None, "of the JobSet; default: from --config")
    flags.DEFINE_bool("spot", False, "on spot nodes")
    flags.DEFINE_enum("run", "sweep", ["sweep", "train"], "which command")
    define_sweep()


def main() -> int:
    """Prints the manifest, and returns the exit status."""
    num_hosts, chips = hosts_of(FLAGS.tpu, FLAGS.topology or "", FLAGS.chips_per_host)
    workdir = FLAGS.workdir if FLAGS["workdir"].present else ""
    in_bucket = workdir.startswith("gs://")
    for name in ("image", "claim"):
        if not FLAGS[name].value and not (name == "claim" and in_bucket):
            raise UserError(f"--{name}: missing; give the {FLAGS[name].help}")
    if in_bucket and FLAGS.claim:
        raise UserError(f"--claim={FLAGS.claim}: leave it out; --workdir is in a bucket")
    if not in_bucket and not PurePosixPath(workdir).is_relative_to(FLAGS.mount):
        raise UserError(
            f"--workdir={workdir}: is outside the volume of --claim; expected {FLAGS.mount}/... or gs://..."
        )
    command = ["python", "-m", f"experiments.{FLAGS.run}", *_arguments(num_hosts, chips)]
    name = FLAGS.name or re.sub(r"[^a-z0-9]+", "-", PurePosixPath(cli.config_spec()).name.lower())
    print(yaml.safe_dump(manifest(name, command, num_hosts, chips), sort_keys=False, width=1000), end="")
    return 0


def hosts_of(tpu: str, topology: str, chips_per_host: int | None) -> tuple[int, int]:
    """The number of hosts of a slice, and of chips of each.

    Raises:
      UserError: there is no such topology.
    """
    dimensions = _TPUS[tpu][1]
    if not re.fullmatch(r"x".join([r"[1-9]\d{0,2}"] * dimensions), topology):
        example = "4x4" if dimensions == 2 else "2x2x4"
        raise UserError(f"--topology={topology}: expected {dimensions} sizes for {tpu}, such as {example}")
    total = math.prod(map(int, topology.split("x")))
    chips = chips_per_host or min(total, 4)
    if total % chips:
        raise UserError(f"--topology={topology}: {total} chips do not divide by --chips_per_host={chips}")
    return total // chips, chips


def _arguments(num_hosts: int, chips: int) -> list[str]:
    """The arguments of the command; checks that it can run on the slice."""
    passed_on = [*PASSED_ON, "shard", "devices_per_run"]
    refuse_listing()
    if FLAGS["jobs"].present:
        raise UserError("--jobs: leave it out; it does not apply to a TPU slice")
    if hosts.asked():
        raise UserError("--distributed: leave it out; it is set where the slice has several hosts")
    if FLAGS.run == "train":
        for name in passed_on[1:]:
            if FLAGS[name].present:
                raise UserError(f"--{name}: applies to --run=sweep only")
        configs = [from_config_dict(FLAGS.config)]
    else:
        points = shard(asked_points(), FLAGS.shard)
        # So that a wrong value is refused here, not on the slice; files of tasks and calls may be there only.
        asked_trials()
        asked_loops()
        after.check(points, None, asked_schemes(), FLAGS.sample, None)
        configs = [point.config for point in points]
    size = FLAGS.devices_per_run
    if size and (num_hosts > 1 or chips % size):
        raise UserError(f"--devices_per_run={size}: needs a slice of one host whose chips it divides")
    for config in configs:
        _check_mesh(config, size or num_hosts * chips)
    arguments = cli.given(*passed_on)
    return [*arguments, "--distributed", f"--start_timeout={_START_S}"] if num_hosts > 1 else arguments


def _check_mesh(config: Config, devices: int) -> None:
    sizes = partition.mesh_shape(config.mesh, devices)
    partition.check_divisible(config, AbstractMesh(sizes, partition.AXES, axis_types=(AxisType.Auto,) * 3))


def manifest(name: str, command: list[str], num_hosts: int, chips: int) -> dict[str, Any]:
    """The JobSet.

    Raises:
      UserError: a name that Kubernetes does not take.
    """
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise UserError(
            f"--name={name}: expected at most 40 lower-case letters, digits and dashes, first a letter"
        )
    nodes = {
        "cloud.google.com/gke-tpu-accelerator": _TPUS[FLAGS.tpu][0],
        "cloud.google.com/gke-tpu-topology": FLAGS.topology,
    }
    if FLAGS.spot:
        nodes["cloud.google.com/gke-spot"] = "true"
    container: dict[str, Any] = {
        "name": "run",
        "image": FLAGS.image,
        "command": command,
        "ports": [{"containerPort": 8471}],  # of libtpu
        "resources": {kind: {"google.com/tpu": chips} for kind in ("requests", "limits")},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # a host cannot come back alone: all start again
        "terminationGracePeriodSeconds": _GRACE_S,
        "nodeSelector": nodes,
        "containers": [container],
    }
    if FLAGS.claim:
        container["volumeMounts"] = [{"name": "runs", "mountPath": FLAGS.mount}]
        pod["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": FLAGS.claim}}]
    # These fail the job with the reason PodFailurePolicy, which the JobSet does not count as a restart.
    ask_for_restart = [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "run", "operator": "In", "values": [RESUME_ME]},
        },
    ]
    job = {
        "parallelism": num_hosts,
        "completions": num_hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": ask_for_restart},
        "template": {"spec": pod},
    }
    again = {
        "name": "resume",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": _RESTARTS,
                "restartStrategy": "BlockingRecreate",  # the old hosts have saved before the new ones read
                "rules": [again],
            },
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}],
        },
    }


if __name__ == "__main__":
    cli.run(main, default_config=DEFAULT_STUDY, define_flags=define_flags)
