"""The flags of commands that write text: how tokens are drawn, and how many."""

from absl import flags

from mobilellm_jax.config import Config
from mobilellm_jax.inference.generate import Sampling

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_integer("max_new_tokens", None, "of a text, at most; else what the context has room for")
    flags.DEFINE_float("temperature", 0.0, "0: the most probable token; 1: drawn as the model says")
    flags.DEFINE_integer("top_k", 0, "draw from the k most probable tokens; 0: from all")
    flags.DEFINE_float("top_p", 1.0, "draw from the fewest tokens that together have this probability")
    flags.DEFINE_integer("seed", 0, "of the draws", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_integer("context", None, "longest prompt and text; else the length of a training row")


def asked() -> Sampling:
    """What the flags ask for; UserError where a value is not valid."""
    return Sampling(temperature=FLAGS.temperature, top_k=FLAGS.top_k, top_p=FLAGS.top_p)


def context(config: Config) -> int:
    """Tokens of the longest prompt and text."""
    return config.data.sequence_length if FLAGS.context is None else FLAGS.context
