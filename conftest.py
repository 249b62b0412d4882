"""What pytest leaves out where an optional dependency is missing."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("numba") else ["sfr/transport/assignment.py"]
