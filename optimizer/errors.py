"""Typed errors. Every message names the thing, its value, the rule and the remedy.

This module is the ground floor: any layer may raise these. The command line turns them into exit codes
(2 for usage, 3 for a failure while running), and nothing else is ever printed without a traceback.
"""


class OptimizerError(Exception):
    """Base of every error this package raises on purpose. Exit code 3 unless a subclass says otherwise."""

    exit_code = 3


class UsageError(OptimizerError, ValueError):
    """The request cannot be served as asked: a bad option, recipe, or argument. Exit code 2."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe is malformed, or names a key, pass or value that does not exist."""


class ModelError(UsageError):
    """The model or tokenizer given cannot be used: missing, corrupt, not finite, or not supported."""


class DataError(UsageError):
    """Calibration or evaluation data is empty, too short, or does not fit the model."""


class OutputError(UsageError):
    """The output folder cannot be written, or is not one this package made."""


class PassError(OptimizerError):
    """A pass could not do what the recipe requires."""


class ArtifactError(OptimizerError):
    """An artifact is incomplete or was changed after it was written."""


class DeviceError(OptimizerError):
    """The device or backend asked for is not present or cannot run the model."""


class EndpointError(OptimizerError):
    """A remote endpoint could not be reached, refused, or answered with something that is no answer."""


class RefusedRequestError(EndpointError):
    """A remote endpoint says that the request is not one that it takes (400, 422)."""


class ExportError(UsageError):
    """A model in an exported format was given, and this version has no support for that format."""
