"""Several processes that train one model together, started by an MPI launcher.

``launcher`` reads what mpiexec or srun say of a process in its environment; ``tree`` adds arrays of
all ranks in an order that does not depend on their number; a run calls an
``alone.Alone`` process or ``world.Ranks``, over mpi4py, which ``join`` makes. mpi4py is imported
only where a launcher has started more than one process.
"""
