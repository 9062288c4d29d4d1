"""Several processes as one run: JAX's own distributed runtime, started where a cluster is found.

JAX finds the other processes of a TPU pod, of SLURM, of GKE and of Open MPI by itself. Any other launcher names
them in ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``.
"""

import importlib.util
import os
from collections.abc import Mapping

import jax

_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start_processes(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of this run, if there are any; before JAX touches a device.

    Raises:
        ValueError: the environment names the processes by halves, or they did not meet.
    """
    named = [name for name in _BY_HAND if name in environment]
    if named:
        _join_by_hand(environment, named)
    elif is_cluster(environment):
        _initialize()


def _join_by_hand(environment: Mapping[str, str], named: list[str]) -> None:
    missing = ", ".join(name for name in _BY_HAND if name not in named)
    if missing:
        raise ValueError(f"several processes need all of {', '.join(_BY_HAND)}; missing {missing}.")
    count, index = (_number(environment, name) for name in _BY_HAND[1:])
    if not 0 <= index < count:
        raise ValueError(
            f"JAX_PROCESS_ID must be from 0 to below JAX_NUM_PROCESSES; got {index} and {count}."
        )
    if count > 1:
        # Without detection: it would give each process of SLURM a single device, which is not ours to say here.
        _initialize(
            coordinator_address=environment[_BY_HAND[0]],
            num_processes=count,
            process_id=index,
            cluster_detection_method="deactivate",
        )


def _initialize(**options: str | int) -> None:
    try:
        jax.distributed.initialize(**options)  # pyright: ignore[reportArgumentType]
    except RuntimeError as error:
        raise ValueError(f"the processes of this run did not meet: {str(error).splitlines()[0]}") from error


def is_cluster(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several processes that JAX can find.

    A lone process on a machine that happens to have SLURM or Kubernetes is none; to look for others would fail.
    """
    # SLURM sets SLURM_NTASKS in an interactive shell, too; the step is what `srun` has started.
    slurm = "SLURM_STEP_NODELIST" in environment and environment.get("SLURM_NTASKS", "1") != "1"
    open_mpi = environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1"
    # An indexed job of GKE with GPUs; JAX asks its API through the package kubernetes.
    gke = {"JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"} <= environment.keys()
    return slurm or open_mpi or gke or _is_tpu_pod(environment)


def _is_tpu_pod(environment: Mapping[str, str]) -> bool:
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    # GKE names the hosts; a Cloud TPU VM does not, and JAX asks the machine's metadata.
    named = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    has_chips = any(map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")))
    return named or (has_chips and importlib.util.find_spec("libtpu") is not None)


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ValueError(f"{name} must be a number; got {environment[name]!r}.") from None
