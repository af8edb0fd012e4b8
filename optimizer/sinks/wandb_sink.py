"""Weights & Biases: one run of a project, online, or in a local folder with `WANDB_MODE=offline`."""

from __future__ import annotations

from optimizer.sinks import Record


def log(record: Record, project: str, _uri: str | None) -> str:
    """Log the record as one run. Returns its address, or its folder when it is offline."""
    import wandb

    config = dict(record.tags) | {"recipe": dict(record.params)}
    run = wandb.init(project=project, name=record.name, config=config, settings=wandb.Settings(silent=True))
    place = run.url or run.dir
    run.summary.update(dict(record.tags))
    run.log(dict(record.metrics))
    if record.files:
        report = wandb.Artifact(f"report-{run.id}", type="report")
        for file in record.files:
            report.add_file(file)
        run.log_artifact(report)
    run.finish()
    return f"run {run.id} in project {project} at {place}"
