"""From what a launcher has started to the ranks of a run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tinygpt.errors import MissingExtraError, TinyGPTError, UsageError, extras
from tinygpt.machine.ranks import launcher
from tinygpt.machine.ranks.alone import Alone
from tinygpt.machine.resources import cores

HUNG_AFTER = 30.0
"""Seconds without a sign of life after which Open MPI declares a rank lost."""
HEARTBEATS = {
    "OMPI_MCA_mpi_ft_detector": "1",
    "OMPI_MCA_mpi_ft_detector_period": str(HUNG_AFTER / 5),
    "OMPI_MCA_mpi_ft_detector_timeout": str(HUNG_AFTER),
}
"""Settings of Open MPI, read when MPI starts: a hung rank is found by its heartbeat. Open MPI's own
thread for that (``mpi_ft_detector_thread``, 5.0.11) keeps MPI from ever ending, so `Heart` is ours.
"""


def join() -> Alone:
    """The ranks that a launcher has started, this process among them; `Alone` without one.

    Raises MissingExtraError without mpi4py, and UsageError where that was built for another MPI
    than the launcher is of: each process would then train by itself, into one folder.
    """
    started = launcher.size()
    if started <= 1:
        return Alone()
    for name, value in HEARTBEATS.items():
        os.environ.setdefault(name, value)
    if launcher.local_size() > cores():
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    program = launcher.name()
    try:
        import mpi4py

        # With processes lost, MPI_Finalize may wait for ever or abort (Open MPI 5.0.11). Without
        # it, the launcher reports each process's own exit code.
        mpi4py.rc.finalize = not launcher.tolerant()
        from mpi4py import MPI
    except ImportError as error:
        raise _only_once(_missing(program, started)) from error
    except RuntimeError as error:  # no libmpi
        raise _only_once(UsageError(f"mpi4py finds no MPI library: {error}")) from error
    found = MPI.COMM_WORLD.Get_size()
    if found != started:
        library = MPI.Get_library_version().strip().split(",")[0].split("\n")[0]
        raise _only_once(
            UsageError(
                f"{program} started {started} processes, but mpi4py's {library} sees {found}: they "
                f"are of different MPIs, and each process would train by itself. Start with the "
                f"launcher of {library} ({own_launcher()}), or rebuild mpi4py for this one: "
                f"{extras.install_command('--force-reinstall', '--no-binary=mpi4py', 'mpi4py')}"
            )
        )
    from tinygpt.machine.ranks.world import Ranks

    return Ranks(MPI)


def _missing(program: str, started: int) -> MissingExtraError:
    return extras.missing(
        "mpi",
        f"{program} started {started} processes, and to train one model they need mpi4py, which is "
        f"not installed.",
    )


def own_launcher() -> str:
    """Where a wheel's launcher lies."""
    path = Path(sys.prefix, "bin", launcher.MPIEXEC)
    return str(path) if path.exists() else launcher.MPIEXEC


def _only_once(error: TinyGPTError) -> TinyGPTError | SystemExit:
    """The error on the first process, and a silent end of the others, as ``leave`` says."""
    return SystemExit(0) if launcher.rank() else error
