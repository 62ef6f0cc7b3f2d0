#!/usr/bin/env python
"""COCO JSON of OpenImages v6's boxes, made of the official CSVs."""

from regionspot_cli.prepare import PREPARE

if __name__ == "__main__":
    PREPARE["openimages"].run()
