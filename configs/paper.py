"""Every comparison of architectures in the paper, one after another.

  python -m experiments.sweep --config=configs/paper.py:tiny

Some 480 short runs; the same command resumes an interrupted sweep. `get_config` has the fields that all
studies share.
"""

from ml_collections import ConfigDict

from configs import base

# Studies at each size: the paper has one size of the embedding study, and one list of published models.
_BOTH = ("roadmap", "depth_vs_width", "head_groups", "layer_sharing", "repeats")
_STUDIES = {
    "tiny": (*_BOTH, "embedding_sharing", "mobilellm", "followups"),
    "small": (*_BOTH, "embedding_sharing", "mobilellm", "followups"),
    "paper_125m": (*_BOTH, "embedding_sharing"),
    "paper_350m": _BOTH,
}
PRESETS = tuple(_STUDIES)


def get_config(preset: str = "tiny") -> ConfigDict:
    """Fields that can be set on the command line, for all studies."""
    base.check_preset(__file__, preset, PRESETS)
    return base.get_config()


def studies(preset: str) -> list[str]:
    """Studies, in the order in which they run."""
    return [f"configs/{name}.py:{preset}" for name in _STUDIES[preset]]
