"""What a command does before its slow imports; only the standard library is imported here."""

import signal
from collections.abc import Callable


def answer_first(parse_arguments: Callable[[], object]) -> None:
    """Answer --help and wrong options at once, and let Ctrl-C end the imports without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    parse_arguments()
