"""The `optimizer` command. Results go to stdout, everything else to stderr; `--json` prints one JSON document.

Exit codes: 0 passed, 1 a floor was missed, 2 usage or configuration, 3 a failure while running. Heavy libraries are
imported by the command that needs them, so `--help` stays fast.
"""

from __future__ import annotations

import typer

from optimizer.commands import analysis, delivery, jobs, measure

app = typer.Typer(
    name="optimizer",
    help="Make a Hugging Face language model smaller and faster, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for commands in (jobs, analysis, measure, delivery):
    app.add_typer(commands.app)


def main() -> None:
    """Entry point of the `optimizer` command."""
    app()


if __name__ == "__main__":
    main()
