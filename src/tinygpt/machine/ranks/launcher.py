"""What mpiexec or srun tell a process of itself, in its environment. Imports no MPI."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping
from typing import NoReturn

SIZE = "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"
"""Processes of the job: Open MPI, MVAPICH, MPICH and Intel MPI, srun. A batch script of Slurm has
SLURM_NTASKS too, and is one process."""
RANK = "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"
"""Number of this process, from 0."""
LOCAL_SIZE = "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"
"""Processes of the job on this host."""
SLURM_TASKS = "SLURM_STEP_TASKS_PER_NODE"
"""The same of srun for each host, such as ``2(x3),1``."""


def size(environment: Mapping[str, str] = os.environ) -> int:
    """Processes that the launcher started for this program; 1 without one."""
    return _number(SIZE, environment) or 1


def rank(environment: Mapping[str, str] = os.environ) -> int:
    """The number of this process; 0 where no launcher says."""
    return _number(RANK, environment) or 0


def local_size(environment: Mapping[str, str] = os.environ) -> int:
    """Processes of the job on this host; 1 where that is unknown."""
    tasks = environment.get(SLURM_TASKS, "").partition(",")[0].partition("(")[0]
    found = _number(LOCAL_SIZE, environment)
    if found is None and size(environment) > 1 and tasks.isdigit():
        found = int(tasks)  # as on the first host, which has the most
    return max(1, min(found or 1, size(environment)))


def own_cores(usable: int, everything: int, environment: Mapping[str, str] = os.environ) -> int:
    """Cores for one of the processes that share this host.

    ``usable`` is what this process may use, ``everything`` what the host has. A launcher that binds
    each process to cores of its own has divided them already.
    """
    sharing = local_size(environment)
    if sharing == 1 or usable * sharing <= everything:
        return usable
    return max(1, usable // sharing)


def tolerant(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the loss of a process is survived: ``mpiexec --with-ft ulfm`` of Open MPI."""
    return environment.get("OMPI_MCA_mpi_ft_enable", "") not in ("", "0", "false")


def end_at_once(code: int) -> NoReturn:
    """End this process with an exit code, or by SIGKILL where others survive its loss.

    Open MPI's launcher (5.0.11) tells the others of a process that a signal has ended. After one
    that ended with a code it stops their output, and they wait for ever for the one that is gone.
    """
    if tolerant():
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(code)


def name(environment: Mapping[str, str] = os.environ) -> str:
    """The launcher's program."""
    by_slurm = SIZE[-1] in environment and _number(SIZE[:-1], environment) is None
    return "srun" if by_slurm else MPIEXEC


MPIEXEC = "mpiexec"


def _number(names: Iterable[str], environment: Mapping[str, str]) -> int | None:
    for key in names:
        if environment.get(key, "").isdigit():
            return int(environment[key])
    return None
