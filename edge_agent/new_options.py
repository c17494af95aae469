"""New options for an NLFT job that runs: which may change and why others may not, and the document that brings them to the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edge_agent.errors import JobSchema
from edge_agent.hints import explain
from edge_agent.job import NlftOptions, Strict

MOST_CHANGES = 256
"""Of one job. Each takes a checkpoint, and all stand in the report."""
Number = Annotated[int, Meta(ge=1, le=MOST_CHANGES)]
BEFORE_TRAINING = "it decides what is done before training"
FIXED = {
    "standard_answers": BEFORE_TRAINING,
    "repair": BEFORE_TRAINING,
    "turning_ratio": BEFORE_TRAINING,
    "references": "the run is planned for the scores that it asks for",
}
"""Fields that cannot change, and why."""
CLUSTER = ("cluster", "cluster_distance", "cluster_max_span")


class NewOptions(Strict, frozen=True):
    """Options that a job is to go on with. Later ones have higher numbers, and each has all fields."""

    number: Number
    method: NlftOptions


def change(options: NlftOptions, fields: Mapping[str, Any]) -> NlftOptions:
    """Return options with the values of some fields replaced. Raises JobSchema."""
    try:
        return msgspec.convert(msgspec.to_builtins(options) | dict(fields), type=NlftOptions)
    except msgspec.ValidationError as error:
        raise JobSchema("method", explain(error, NlftOptions)) from None


def check_change(own: object, new: NlftOptions) -> None:
    """Raise JobSchema where a job with the method `own` cannot go on with new options.

    Weights are made anew of scores that were taken for the job's own options, so only what makes weights of scores can change. Hidden
    states are kept for no later weights: a job with clusters can change where it takes them again for every update.
    """
    if not isinstance(own, NlftOptions):
        raise JobSchema("method", "the job does not train by nlft, and no other method has options that can change while it runs")
    changed = [name for name in own.__struct_fields__ if getattr(own, name) != getattr(new, name)]
    for name in changed:
        if why := FIXED.get(name):
            raise JobSchema(f"method.{name}", f"it cannot change while a job runs: {why}; submit a new job")
        if name in CLUSTER and own.cluster == "none":
            raise JobSchema(f"method.{name}", "it cannot change while this job runs, which takes no hidden states; submit a new job")
    if changed and own.cluster != "none" and own.references != "live":
        raise JobSchema(
            f"method.{changed[0]}",
            f'it cannot change while this job runs: it has clusters, whose hidden states are kept only with references "live", '
            f'not "{own.references}"; submit a new job',
        )
