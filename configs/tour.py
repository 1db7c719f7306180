"""The first look: depth against width, and layer sharing.

  python -m experiments.sweep

This is the default of the sweep and takes about 7 minutes on 2 CPU cores. `get_config` has the fields that
both studies share, so that `--config.train.steps=500` applies to both.
"""

from ml_collections import ConfigDict

from configs import base

PRESETS = ("tiny", "small", "paper_125m", "paper_350m")


def get_config(preset: str = "tiny") -> ConfigDict:
    """Fields that can be set on the command line, for all studies."""
    base.check_preset(__file__, preset, PRESETS)
    return base.get_config()


def arms(preset: str) -> tuple[str, ...]:
    """Parameterizations that are run, of those that the studies have; --arms chooses others."""
    return ("completep",) if preset in ("tiny", "small") else ()


def studies(preset: str) -> list[str]:
    """Studies, in the order in which they run."""
    return [f"configs/depth_vs_width.py:{preset}", f"configs/layer_sharing.py:{preset}"]
