#!/usr/bin/env python
"""The command `regionspot train`: train a model, or evaluate one with --eval-only."""

from regionspot_cli.commands import COMMANDS

if __name__ == "__main__":
    COMMANDS["train"].run()
