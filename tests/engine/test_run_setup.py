"""Formatting of a run's log for files and terminals."""

import logging

import pytest
from torch import nn

from regionspot.engine.run_setup import PrintableFormatter, learning_modules


@pytest.mark.parametrize(("with_colors", "color"), [(True, "\x1b[32mname\x1b[0m"), (False, "name")])
def test_control_characters_are_escaped(with_colors, color):
    formatter = PrintableFormatter(logging.Formatter("%(message)s"), with_colors)
    arguments = ("\x1b[32mname\x1b[0m", "a\x1b[2Jb\x07\x9b\r", "tab\tline\nü")
    record = logging.LogRecord("regionspot", logging.INFO, __file__, 1, "%s %s %s", arguments, None)
    assert formatter.format(record) == rf"{color} a\x1b[2Jb\x07\x9b\r " + "tab\tline\nü"


def test_learning_modules_are_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), nn.LayerNorm(2))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    assert learning_modules(model) == ["1", "2.weight"]
