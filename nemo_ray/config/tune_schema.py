"""The keys of the `tune` section: which trials a sweep makes, how it judges them, and what it may spend."""

from typing import Annotated, Any, Literal

from pydantic import Field

from nemo_ray.config.kinds import Bool, Kind, Metric, NonNegative, Positive, PositiveInt, Seed, Text
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
        "`optuna`: points chosen by TPE from the results so far.",
    )
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt"] = Field(
        "asha", description="Which trials are stopped before their end."
    )
    seed: Seed = Field(0, description="Of the search.")
    max_concurrent: PositiveInt | None = Field(
        None,
        description="Trials that run at a time.",
        json_schema_extra={"default_text": "as many as the cluster has room for"},
    )
    max_hours: Positive | None = Field(None, description="No trial begins, and all stop, after so long.")
    max_tokens: PositiveInt | None = Field(None, description="The same after so many tokens of all trials.")
    max_cost: Positive | None = Field(
        None, description="The same after so much money, by `price_per_gpu_hour`."
    )
    price_per_gpu_hour: NonNegative | None = Field(None, description="Of one GPU of a worker, for an hour.")
    keep_pruned_checkpoints: Bool = Field(
        False, description="Keep the checkpoints of trials that were stopped before their end."
    )
