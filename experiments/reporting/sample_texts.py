"""What the best and the worst design of a study write."""

from experiments.reporting.tables import Columns
from mobilellm_jax.analysis.study import Study

SAMPLES = (
    "The same prompts, continued by the first run of the design that is best on average, and by that of the "
    "worst one, drawn with the same random numbers."
)


def table(study: Study) -> Columns | None:
    """One row for each prompt and design; None where no run was asked for texts."""
    means = {label: estimate.mean for label, estimate in study.verdict.estimates.items()}
    texts = {label: run.samples for label in means for run in study.points[label].finished[:1] if run.samples}
    if not texts:
        return None
    ranked = sorted(texts, key=means.__getitem__)
    chosen = list(dict.fromkeys([ranked[0], ranked[-1]]))
    prompts = list(dict.fromkeys(prompt for label in chosen for prompt in texts[label]))
    rows = [(prompt, label) for prompt in prompts for label in chosen if prompt in texts[label]]
    return {
        "prompt": [prompt for prompt, _ in rows],
        "point": [label for _, label in rows],
        study.facts.metric: [f"{means[label]:.4f}" for _, label in rows],
        "goes on": [" ".join(texts[label][prompt]["text"].split()) for prompt, label in rows],
    }
