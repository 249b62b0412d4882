"""The command `python -m benchmarks.accuracy`."""

from benchmarks.accuracy.runner import main, parse_arguments

__all__ = ["main", "parse_arguments"]

if __name__ == "__main__":
    main()
