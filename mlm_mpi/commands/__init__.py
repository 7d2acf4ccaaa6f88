"""The commands of `mlm-mpi`: arguments in, one call, an exit code out."""
