"""The parts of `experiments.soak`: kills and signals of real runs, and damage to real files."""
