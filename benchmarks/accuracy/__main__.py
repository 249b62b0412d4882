"""The command `python -m benchmarks.accuracy`."""

from benchmarks.accuracy.runner import main

main()
