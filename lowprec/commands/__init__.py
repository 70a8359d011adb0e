"""The commands of `lowprec`: each is a thin function over the packages, which are imported when it runs."""

from lowprec.commands import bench, catalogs, laws, runs, sweeps

# Modules whose add_to(commands) adds theirs, in the order of --help.
TOPICS = (runs, sweeps, laws, catalogs, bench)

__all__ = ["TOPICS"]
