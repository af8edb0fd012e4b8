"""MLflow: a run in an experiment, on the server, database or folder that its tracking URI names."""

from __future__ import annotations

import re

from optimizer.sinks import Record

PARAM_LENGTH = 500
"""Characters of a parameter's value: the least that any tracking store of MLflow takes."""


def log(record: Record, project: str, uri: str | None) -> str:
    """Log the record as one run of the experiment `project`. Returns the run's id and where it is."""
    import mlflow

    if uri is not None:
        mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(project)
    with mlflow.start_run(run_name=record.name) as run:
        mlflow.set_tags(dict(record.tags))
        mlflow.log_params({_key(key): value[:PARAM_LENGTH] for key, value in record.flat_params().items()})
        mlflow.log_metrics({_key(key): value for key, value in record.metrics.items()})
        for file in record.files:
            mlflow.log_artifact(file)
    return f"run {run.info.run_id} in experiment {project} at {mlflow.get_tracking_uri()}"


def _key(name: str) -> str:
    """A name that MLflow takes: letters, digits, and `_-. /:`."""
    return re.sub(r"[^\w\-. /:]", "_", name, flags=re.ASCII)
