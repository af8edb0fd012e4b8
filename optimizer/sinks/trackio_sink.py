"""trackio: one run of a project in its local database (`TRACKIO_DIR`)."""

from __future__ import annotations

from optimizer.sinks import Record


def log(record: Record, project: str, _uri: str | None) -> str:
    """Log the record as one run. trackio keeps no files of this kind, so it is told where the reports lie."""
    import trackio

    config = {**record.flat_params(), **record.tags, "reports": ", ".join(record.files)}
    trackio.init(project=project, name=record.name, config=config, embed=False)
    trackio.log(dict(record.metrics))
    trackio.finish()
    return f"run {record.name} in project {project}"
