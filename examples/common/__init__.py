"""What several examples share: data, networks, metrics, and the folder of a run.

A script in examples/ imports this package as `common`, for Python puts the folder of a script on its path. From the
root of the repository it is `examples.common`.
"""
