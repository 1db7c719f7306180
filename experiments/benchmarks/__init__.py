"""The parts of `experiments.bench`: each has a `measure(quick)` that returns the lines of its table."""
