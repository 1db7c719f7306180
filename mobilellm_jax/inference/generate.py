"""Text generation: prompts are read at once (prefill), then a compiled step adds one token to each.

Shorter prompts of a batch are padded on the left, see `model.Cache`: the text generated for a prompt does not
depend on the others. Letters as in model/__init__.py.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from mobilellm_jax import model
from mobilellm_jax import validation as rules
from mobilellm_jax.config import ModelConfig
from mobilellm_jax.data import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.cache import MOST_UNROLLED, exit_places, extend_until_sure
from mobilellm_jax.model.stack import cast, unstack
from mobilellm_jax.model.uses import ENTRY, written_out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for drawing a token from its logits. Hashable: a static argument of jitted functions.

    Attributes:
      temperature: divisor of the logits; 0 takes the most probable token.
      top_k: only the k most probable tokens may be chosen; 0 means all.
      top_p: of these, the fewest most probable ones that together have this share of the probability.
    """

    temperature: float
    top_k: int
    top_p: float

    def __post_init__(self) -> None:
        top_p = (lambda v: 0 < v <= 1, "a number above 0, and at most 1")
        rules.check_all(self, {"temperature": rules.NOT_NEGATIVE, "top_k": rules.COUNT, "top_p": top_p})
        if self.temperature == 0 and (self.top_k, self.top_p) != (0, 1.0):
            raise UserError(
                f"temperature: 0 always takes the most probable token, so top_k={self.top_k} and "
                f"top_p={self.top_p} have no effect; use a temperature above 0, or top_k=0 and top_p=1"
            )


GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)


def choose(
    logits_BV: Float[Array, "B V"], keys_B: Key[Array, "B"], sampling: Sampling
) -> tuple[Int[Array, "B"], Key[Array, "B"]]:
    """Draws the next token of each row; also gives the next keys. Ties with the last candidate are kept."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1), keys_B
    # The largest logit becomes 0, so that no temperature makes several infinite. A temperature below the
    # smallest normal float32 would become 0; clamped to it, it draws the same tokens.
    temperature = max(sampling.temperature, float(jnp.finfo(jnp.float32).tiny))
    logits_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / temperature
    if sampling.top_k:
        most_BK, _ = lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[1]))
        logits_BV = jnp.where(logits_BV >= most_BK[:, -1:], logits_BV, -jnp.inf)
    if sampling.top_p < 1:
        falling_BV = -jnp.sort(-logits_BV, axis=-1)
        p_BV = jax.nn.softmax(falling_BV, axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV  # probability of all that is more probable
        kept_BV = jnp.where(before_BV < sampling.top_p, falling_BV, jnp.inf)
        least_B1 = jnp.min(kept_BV, axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    next_keys_B, keys_B = jnp.moveaxis(jax.vmap(jax.random.split)(keys_B), 1, 0)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV), next_keys_B


class Exit(NamedTuple):
    """When to leave out layers, see `cache.extend_until_sure`. Hashable: a static argument.

    Attributes:
      places: numbers of layers after which generation may stop.
      above: the probability that the most probable token has to exceed.
    """

    places: tuple[int, ...]
    above: float


class State(NamedTuple):
    """The state of generation: the cache, the tokens to read next, and the random keys of later draws."""

    cache: model.Cache
    tokens_B: Int[Array, "B"]
    keys_B: Key[Array, "B"]


def prefill(
    params: model.Params,
    tokens_BT: Int[Array, "B T"],
    padding_B: Int[Array, "B"],
    keys_B: Key[Array, "B"],
    slots: int,
    config: ModelConfig,
    sampling: Sampling,
) -> tuple[State, Int[Array, "B"]]:
    """Reads the prompts into a new cache; returns the state and the first token after each prompt."""
    return _read(params, tokens_BT, model.empty_cache(padding_B, slots, config), keys_B, config, sampling)


def decode(
    params: model.Params, state: State, config: ModelConfig, sampling: Sampling
) -> tuple[State, Int[Array, "B"]]:
    """Reads one more token of each row; returns the state and the token after each."""
    return _read(params, state.tokens_B[:, None], state.cache, state.keys_B, config, sampling)


def decode_until_sure(
    params: model.Params, state: State, config: ModelConfig, sampling: Sampling, leave: Exit
) -> tuple[State, Int[Array, "B"], Int[Array, ""]]:
    """`decode` that leaves out layers, see `cache.extend_until_sure`; also the number of layers applied."""
    x_B1D, cache, applied = extend_until_sure(params, state.tokens_B[:, None], state.cache, config, *leave)
    tokens_B, keys_B = choose(model.logits(params, x_B1D)[:, 0], state.keys_B, sampling)
    return State(cache, tokens_B, keys_B), tokens_B, applied


def _read(params: model.Params, tokens_BT: Any, cache: Any, keys_B: Any, config: Any, sampling: Any) -> Any:
    x_BTD, cache = model.extend(params, tokens_BT, cache, config)
    logits_BV = model.logits(params, x_BTD[:, -1:])[:, 0]
    tokens_B, keys_B = choose(logits_BV, keys_B, sampling)
    return State(cache, tokens_B, keys_B), tokens_B


class Generator:
    """A model on its device, with its compiled programs."""

    def __init__(
        self,
        params: model.Params,
        config: ModelConfig,
        sampling: Sampling,
        context: int,
        exit_above: float | None = None,
    ) -> None:
        """Takes float32 parameters; `context` limits the length of a prompt with its continuation.

        Where uses of a block differ, each is written out once, as a block of its own. With `exit_above`,
        layers are left out as soon as all rows have a token of a larger probability, and `layers_applied`
        says how many were applied for each token after the first.

        Raises:
          UserError: the threshold is not from 0 to 1, or the plan has too few or too many layers.
        """
        if exit_above is not None:
            rules.check_rule("exit_above", exit_above, rules.FRACTION)
            layers = config.effective_depth
            rules.check(1 < layers <= MOST_UNROLLED, "exit_above: layers", layers, f"2 to {MOST_UNROLLED}")
        self._exit = None if exit_above is None else Exit(exit_places(config.plan), exit_above)
        self._applied: list[Array] = []
        rules.check_rule("context", context, rules.POSITIVE_INT)
        params, self.config = written_out(params, config)
        self.sampling, self.context = sampling, context
        # Once, not at every step. A list: `extend` reads its blocks where they stand.
        entry = {name: leaf for name, leaf in params.items() if name == ENTRY}
        cast_once = cast({name: leaf for name, leaf in params.items() if name != ENTRY}, self.config)
        self._params = jax.device_put(unstack(cast_once) | entry)
        self._programs: dict[tuple[int, int, int], tuple[Any, Any]] = {}

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | None,
        eos_id: int | None,
        seed: int,
        place: int = 0,
    ) -> Iterator[list[int | None]]:
        """Checks the prompts, compiles, and returns an iterator over steps: the next token of each prompt.

        A token is None after the `eos_id` of its prompt. Draws for a prompt depend on the seed and on its
        place among the prompts.

        Args:
          prompts: token ids.
          max_new_tokens: steps at most; None takes as many as the context has room for.
          eos_id: the token that ends a text, if any.
          seed: of the draws.
          place: of the first prompt; a prompt at place n draws as the one at n of a batch that begins at 0.

        Raises:
          UserError: a prompt is empty, has an unknown token, or is too long for the context.
        """
        check_prompts(prompts, max_new_tokens, self.config.vocab_size, self.context)
        longest = max(map(len, prompts))
        steps = self.context - longest if max_new_tokens is None else max_new_tokens
        length = _round_up(longest)
        tokens_BT = np.array([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], np.int32)
        padding_B = np.array([length - len(prompt) for prompt in prompts], np.int32)
        places_B = place + np.arange(len(prompts))
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), places_B)
        inputs = tokens_BT, padding_B, keys_B
        return self._steps(self._compile(inputs, _round_up(length + steps)), inputs, steps, eos_id)

    @property
    def layers_applied(self) -> list[int]:
        """Of every token but the first of each text, where `exit_above` was asked for."""
        return [int(count) for count in self._applied]

    def _steps(
        self, programs: Any, inputs: Any, steps: int, eos_id: int | None
    ) -> Iterator[list[int | None]]:
        first, more = programs
        state, tokens_B = first(self._params, *inputs)
        ended = [False] * len(inputs[0])
        for step in range(1, steps + 1):
            ready_B = tokens_B
            if step < steps:  # the device works while these tokens are used
                state, tokens_B, *applied = more(self._params, state)
                self._applied += applied
            ids = [None if end else token for end, token in zip(ended, ready_B.tolist(), strict=True)]
            yield ids
            ended = [token is None or token == eos_id for token in ids]
            if all(ended):
                return

    def _compile(self, inputs: tuple[np.ndarray, np.ndarray, Array], slots: int) -> tuple[Any, Any]:
        key = (*inputs[0].shape, slots)
        if key not in self._programs:
            first = jax.jit(prefill, static_argnums=(4, 5, 6))
            leave = () if self._exit is None else (self._exit,)
            read = decode_until_sure if leave else decode
            more = jax.jit(read, static_argnums=(2, 3, 4)[: 2 + len(leave)], donate_argnums=1)
            first = first.lower(self._params, *inputs, slots, self.config, self.sampling)
            state, _ = first.out_info
            more = more.lower(self._params, state, self.config, self.sampling, *leave)
            self._programs[key] = first.compile(), more.compile()
        return self._programs[key]


def check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int | None, vocab_size: int, context: int
) -> None:
    """Checks that prompts are valid and that prompts and new tokens fit in the context.

    Raises:
      UserError: they do not; the message names the prompt, counted from 1.
    """
    least = 1 if max_new_tokens is None else max_new_tokens
    rules.check_rule("max_new_tokens", least, rules.POSITIVE_INT)
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) == 0:
            raise UserError(f"prompt {number}: is empty; expected at least one token")
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise UserError(
                    f"prompt {number}: token {token} is not valid; expected 0 to {vocab_size - 1}"
                )
        if len(prompt) + least > context:
            raise UserError(
                f"prompt {number}: its {len(prompt)} tokens and max_new_tokens={least} do not fit "
                f"in the context of {context}; shorten them, or raise --context (by default as in training)"
            )


def _round_up(length: int) -> int:
    """Rounds up to a power of 2, at least 16, so that few compiled programs serve all lengths."""
    return max(16, 1 << (length - 1).bit_length())


class TextStream:
    """Incremental decoding of token ids; the pieces joined are the text of all ids.

    A token may end within a character, and its text may depend on the tokens before it (SentencePiece drops
    the space before the first word, or all of them). A piece is therefore a difference: the text of the last
    few ids, with a word among them, extended by new ids up to a complete character, minus their text before.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._done = 0

    def add(self, token: int) -> str:
        """The text that this id completes; "" where it completes none."""
        self._ids.append(token)
        piece = self._rest()
        if not piece or piece.endswith("\ufffd"):  # decoded from an incomplete character
            return ""
        if self._tokenizer.decode(self._ids[self._done :]).strip():
            self._start = self._done
        self._done = len(self._ids)
        return piece

    def finish(self) -> str:
        """The remaining text: an incomplete character, shown as U+FFFD."""
        piece = self._rest()
        self._start = self._done = len(self._ids)
        return piece

    def _rest(self) -> str:
        old = self._tokenizer.decode(self._ids[self._start : self._done])
        return self._tokenizer.decode(self._ids[self._start :])[len(old) :]
