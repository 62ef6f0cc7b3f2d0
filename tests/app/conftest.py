"""The app's model, at a tiny size: with SAM's and CLIP's weights from files, so that its masks are shown."""

import pytest

from ..helpers import frozen_overrides, tiny_config, tiny_model, write_frozen_parts


@pytest.fixture(scope="package")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights")
    write_frozen_parts(tiny_model(names=None).recognizer, directory)
    node = "MODEL.REGIONSPOT.PROPOSALS"
    settings = {"POINTS_PER_SIDE": 4, "PRED_IOU_THRESH": 0.0, "STABILITY_SCORE_THRESH": 0.0}
    overrides = [part for key, value in settings.items() for part in (f"{node}.SAM_AUTOMATIC.{key}", value)]
    return tiny_config(*frozen_overrides(directory), *overrides, f"{node}.TOP_K", 4)


@pytest.fixture(scope="package")
def model(config):
    from regionspot.app.recognition import PageModel

    return PageModel(config)
