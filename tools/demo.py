#!/usr/bin/env python
"""The former name of `tools/predict.py`, which still works."""

import sys

from regionspot_cli.commands import COMMANDS

if __name__ == "__main__":
    print("tools/demo.py is now tools/predict.py, with the same arguments", file=sys.stderr)
    COMMANDS["predict"].run()
