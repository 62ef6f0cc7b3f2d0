"""The command lines: ``regionspot train``, ``regionspot predict`` and so on, which ``tools/`` has as scripts.

This package stands beside ``regionspot`` because importing that takes seconds, with PyTorch and Detectron2. What reads
the arguments imports the standard library alone; the module that does a command's work is imported after that.
"""
