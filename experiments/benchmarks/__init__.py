"""The parts of `experiments.bench`: each module has a `measure(quick)` that returns the lines of its table."""
