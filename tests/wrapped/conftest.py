collect_ignore = ["shard_ranks.py"]  # no doctests in a script of several processes
