"""A program that reserves a directory for a run, until it is killed."""

import sys
import time

from regionspot.utils.run_lock import run_lock

with run_lock(sys.argv[1]):
    sys.stdout.write("held\n")
    sys.stdout.flush()
    time.sleep(600)
