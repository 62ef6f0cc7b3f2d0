#!/usr/bin/env python
"""LVIS minival, made of lvis_v1_val.json."""

from regionspot_cli.prepare import PREPARE

if __name__ == "__main__":
    PREPARE["lvis_minival"].run()
