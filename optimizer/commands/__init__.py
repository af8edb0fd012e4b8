"""The commands of `optimizer`, a module for each kind; `optimizer.cli` is the entry point.

A module imports the heavy libraries inside of its commands, so that `--help` stays fast.
"""
