"""trackio: one run of a project in its local database (`TRACKIO_DIR`)."""

from __future__ import annotations

from optimizer.sinks import Record


def log(record: Record, project: str, _uri: str | None) -> str:
    """Log the record as one run, the reports as its artifact. Returns the run and its project."""
    import trackio

    trackio.init(project=project, name=record.name, config={**record.flat_params(), **record.tags}, embed=False)
    trackio.log(dict(record.metrics))
    if record.files:
        report = trackio.Artifact(f"report-{record.name}", type="report")
        for file in record.files:
            report.add_file(file)
        trackio.log_artifact(report)
    trackio.finish()
    return f"run {record.name} in project {project}"
