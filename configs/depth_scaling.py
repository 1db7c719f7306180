"""Does depth pay, and from which size on? Depth at equal parameters, at several sizes and horizons.

  python -m experiments.sweep --config=configs/depth_scaling.py:laptop --workdir=runs/scaling
  python -m experiments.scaling --workdir=runs/scaling

`laptop` takes about 40 minutes on 2 CPU cores. The second command fits loss against parameters for the
shallowest and the deepest model of each size, and estimates where the two cross.
"""

from ml_collections import ConfigDict

from configs import base, depth_vs_width

PRESETS = ("laptop",)


def get_config(preset: str = "laptop") -> ConfigDict:
    """Fields that can be set on the command line, for all studies."""
    base.check_preset(__file__, preset, PRESETS)
    return base.get_config()


def studies(preset: str) -> list[str]:
    """Studies, in the order in which they run."""
    base.check_preset(__file__, preset, PRESETS)
    return [f"configs/depth_vs_width.py:{member}" for member in depth_vs_width.LAPTOP]
