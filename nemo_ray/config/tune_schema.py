"""The keys of the `tune` section: which trials a sweep makes, how it judges them, and what it may spend."""

from typing import Annotated, Any, Literal

from pydantic import Field

from nemo_ray.config.kinds import Bool, Kind, Metric, Positive, PositiveInt, Seed, Text
from nemo_ray.config.schema import Section

Parameters = Annotated[
    dict[Text, Any],
    Field(min_length=1),
    Kind("a map from a key of training to values, a range or a formula"),
]


class TuneSection(Section):
    """A sweep."""

    parameters: Parameters = Field(
        description="What the trials try, by key of the configuration: a list of values, `{uniform: [low, "
        "high]}`, `{loguniform: [low, high]}`, `{quniform: [low, high, step]}`, or a formula over other keys "
        "(`lora_alpha: 2 * lora_r`)."
    )
    metric: Metric = Field("eval_loss", description="What trials are compared by, an evaluation's figure.")
    mode: Literal["min", "max"] = Field("min", description="Whether less of `metric` is better, or more.")
    num_trials: PositiveInt | None = Field(
        None,
        description="How many trials. A grid that has more points is refused.",
        json_schema_extra={"default_text": "the grid's points; 10 otherwise"},
    )
    search: Literal["grid", "random", "optuna"] = Field(
        "random",
        description="`grid`: every combination of the lists. `random`: distinct points drawn from `seed`. "
        "`optuna`: what Optuna's TPE proposes after the results so far (`pip install nemo-ray[optuna]`).",
    )
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt"] = Field(
        "asha",
        description="`asha`: at the 1st, 3rd, 9th, ... evaluation a trial goes on if it is among the best "
        "third of those that got there. `hyperband`: the same for five of eight trials, from the 3rd "
        "evaluation on for two and from the 9th for one. `median`: at each evaluation it goes on if it is "
        "among the better half. `pbt`: nobody stops; from time to time the worst quarter goes on from the "
        "weights of the best, with other values. `none`: every trial trains to its end.",
    )
    perturbation_interval: PositiveInt | None = Field(
        None,
        description="Evaluations from one generation of `pbt` to the next.",
        json_schema_extra={"default_text": "1"},
    )
    seed: Seed = Field(0, description="Of the search.")
    max_concurrent: PositiveInt | None = Field(
        None,
        description="Trials that run at a time.",
        json_schema_extra={"default_text": "as many as the cluster has room for"},
    )
    max_hours: Positive | None = Field(
        None, description="After so long no trial begins any more, and those that run save and end."
    )
    max_steps: PositiveInt | None = Field(
        None, description="The same after so many steps of all trials together."
    )
    max_tokens: PositiveInt | None = Field(
        None, description="The same after so many tokens of all trials together."
    )
    max_cost: Positive | None = Field(
        None,
        description="The same when the GPUs of all trials have cost so much; needs `price_per_gpu_hour`.",
    )
    price_per_gpu_hour: Positive | None = Field(
        None, description="What a GPU costs an hour, in whatever currency: the report then shows costs."
    )
    keep_pruned_checkpoints: Bool = Field(
        False, description="Keep the checkpoints of trials that were stopped before their end."
    )
