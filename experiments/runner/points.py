"""A point is a design of a study; its runs differ in learning rate and seed."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from mobilellm_jax.config import Config, ModelConfig
from mobilellm_jax.costs import accounting

# Added to the seeds of tuning runs, so that a point is not judged on the noise that chose its learning rate.
TUNING_SEED = 1_000_000

# From the points of the sweep without flags, on 2 CPU cores: 54 s for 1 x 96, 83 s for 8 x 32 of fewer FLOPs.
_LAYER_FLOPS = 1e5


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a point.

    Attributes:
      config: with learning rate and seeds set.
      facts: the fields of its record that are known to the study.
      name: study, preset, point, and what tells it from the point's other runs, as a relative path.
    """

    config: Config
    facts: dict[str, Any]
    name: str


@dataclasses.dataclass(frozen=True)
class Point:
    """A design of a study.

    Attributes:
      name: study, preset and what `names.of_labels` makes of the label, as a relative path.
      config: the validated config, at the study's learning rate and first seeds.
      facts: what all its records have in common.
      learning_rates: the grid that tuning starts from; empty where nothing is tuned.
      tuning_seeds: runs of the best rate and its neighbours.
      seeds: number of runs that count.
      vary: the seeds that change from run to run: "init", "data".
      sd: expected standard deviation of the metric over seeds; None if not known.
      control: outside the matched budget on purpose.
      notes: what is to be said of its study before a sweep.
      teacher: the model of its teacher; None without one, and where it is not there yet.
      makes: the commands that make the runs it learns or starts from, by directory.
    """

    name: str
    config: Config
    facts: dict[str, Any]
    learning_rates: tuple[float, ...]
    tuning_seeds: int
    seeds: int
    vary: tuple[str, ...]
    sd: float | None = None
    control: bool = False
    notes: tuple[str, ...] = ()
    teacher: ModelConfig | None = None
    makes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def arm(self) -> tuple[str, str, str | None]:
        """Study, preset and arm: the points with which it shares a fit of the learning rates."""
        return self.facts["study"], self.facts["preset"], self.facts["arm"]

    def at_rate(self, learning_rate: float) -> "Point":
        """The point with the learning rate of its comparison, so that there is nothing left to tune."""
        optimizer = dataclasses.replace(self.config.optimizer, learning_rate=learning_rate)
        config = dataclasses.replace(self.config, optimizer=optimizer)
        return dataclasses.replace(self, config=config, learning_rates=())

    def run_names(self) -> list[str]:
        """Names of the comparison runs, by seed; the learning rate is not part of them."""
        return [f"{self.name}-s{seed}" for seed in range(self.seeds)]

    def tuning_run(self, learning_rate: float, index: int) -> Run:
        """A run of the search for the learning rate, evaluated after its last step only.

        It is judged on documents of its own, so that no rate is chosen on those that decide the comparison.
        """
        name, seed = f"{self.name}-lr{learning_rate:.3g}-s{index}", TUNING_SEED + index
        every = self.config.train.steps
        return self._run("tuning", name, learning_rate, seed, eval_every=every, eval_split="tuning")

    def comparison_runs(self, learning_rate: float) -> Iterator[Run]:
        every = self.config.train.eval_every
        for seed, name in enumerate(self.run_names()):
            yield self._run("comparison", name, learning_rate, seed, eval_every=every)

    def _run(self, phase: str, name: str, learning_rate: float, seed: int, **train: Any) -> Run:
        seeds = {f"{kind}_seed": getattr(self.config.train, f"{kind}_seed") + seed for kind in self.vary}
        config = dataclasses.replace(
            self.config,
            optimizer=dataclasses.replace(self.config.optimizer, learning_rate=learning_rate),
            train=dataclasses.replace(self.config.train, **train, **seeds),
        )
        return Run(config, {**self.facts, "phase": phase, "seed": seed}, name)

    @property
    def runs(self) -> int:
        """Expected number of runs: for tuning the grid, one refinement, and the repetitions."""
        tuning = len(self.learning_rates) + 1 + 3 * (self.tuning_seeds - 1)
        return self.seeds + (tuning if self.learning_rates else 0)

    @property
    def flops(self) -> float:
        """Training FLOPs of one run, its teacher's included."""
        return self.tokens * self.flops_per_token

    @property
    def flops_per_token(self) -> float:
        return accounting.run_budgets(self.config, self.teacher)["train_flops_per_token"]

    @property
    def cost(self) -> float:
        """Relative run time, for scheduling: FLOPs plus an overhead per layer."""
        layers = self.config.model.effective_depth + (self.teacher.effective_depth / 3 if self.teacher else 0)
        return self.flops + self.tokens * _LAYER_FLOPS * layers

    @property
    def tokens(self) -> int:
        """Training tokens of one run."""
        c = self.config
        return c.train.steps * c.train.batch_size * c.data.sequence_length
