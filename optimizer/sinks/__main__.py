"""The process in which a tracker runs: a request on stdin, where it was logged on stdout."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module

from optimizer.sinks import SINKS, Record


def main() -> None:
    """Log one record. What the tracker prints goes to stderr; the answer follows a NUL on stdout."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    if request["sink"] not in SINKS:
        raise SystemExit(f"there is no sink {request['sink']!r}; there are {', '.join(SINKS)}")
    sink = import_module(f"optimizer.sinks.{request['sink']}_sink")
    answers.write("\0" + sink.log(Record(**request["record"]), request["project"], request["uri"]))
    answers.close()


if __name__ == "__main__":
    main()
