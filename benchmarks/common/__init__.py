"""What several benchmarks share: data, networks, the description of the machine, tables and pages."""
