"""How tinygrad runs here: device, compiler, cores, kernels that last. Knows nothing of models.

Importing a module of the package changes nothing in the process. What does is ``start``, which the
public names of ``tinygpt`` and the command line call. A program that uses other modules may call
it too; without it, the results are the same, from one core and with every kernel made anew.
"""

from functools import cache
from types import ModuleType


@cache
def start() -> None:
    """Set tinygrad up for this machine: environment, default device, kernels on disk, all cores.

    What concerns the environment happens at once, the rest when tinygrad is imported; where it is
    already, with what it has read by then. The second call does nothing, and none imports tinygrad.
    """
    from tinygpt.machine import device, hook

    device.prepare()
    hook.after_import("tinygrad", _with_tinygrad)


def _with_tinygrad(_: ModuleType) -> None:
    from tinygpt.machine import kernel_store, pool

    kernel_store.install()
    pool.install()
