"""Batches that workers hand over packed."""

import subprocess
import sys

import torch
from detectron2.structures import Boxes, Instances
from torch.utils.data import Dataset

from regionspot.data.packed_loader import PackedLoader


class Samples(Dataset):
    """Mapped images of several sizes, without and with regions."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        boxes = Boxes(torch.rand(index % 4, 4, generator=generator))
        return {
            "image": torch.randint(256, (3, 4 + index, 5), generator=generator, dtype=torch.uint8).transpose(1, 2),
            "tokens": torch.rand(index % 4, 8, generator=generator).half(),
            "instances": Instances((4 + index, 5), gt_boxes=boxes, gt_classes=torch.arange(index % 4)),
            "file_name": f"{index}.jpg",
            "unreadable": ["a.jpg"] if index == 3 else [],
        }


def plain(sample):
    fields = {name: getattr(x, "tensor", x).tolist() for name, x in sample["instances"].get_fields().items()}
    tensors = {key: sample[key].tolist() for key in ("image", "tokens")}
    return {**sample, **tensors, "instances": (sample["instances"].image_size, fields)}


def test_workers_hand_over_the_same_samples_in_a_few_tensors():
    batches = [list(PackedLoader(Samples(), batch_size=4, num_workers=workers)) for workers in (0, 2)]
    unpacked = [[[plain(sample) for sample in batch] for batch in part] for part in batches]
    assert unpacked[0] == unpacked[1] and [len(batch) for batch in unpacked[1]] == [4, 4, 1]
    for batch in batches[1]:
        tensors = [x for sample in batch for x in (sample["image"], sample["tokens"], sample["instances"].gt_classes)]
        assert len({x.untyped_storage().data_ptr() for x in tensors}) <= 3  # uint8, float16, int64
        assert all(x.is_contiguous() for x in tensors)


BUSY_WORKER = """
import time
from regionspot.data.build import _start_worker
from regionspot.data.packed_loader import PackedLoader

class Slow(list):
    def __getitem__(self, index):
        time.sleep(600 * (index > 0))
        return index

options = {"num_workers": 1, "persistent_workers": True, "worker_init_fn": _start_worker}
iterator = iter(PackedLoader(Slow(range(9)), batch_size=1, **options))
next(iterator)
raise RuntimeError("a bug")
"""


def test_failed_program_ends_though_workers_ignore_signals():
    program = [sys.executable, "-c", BUSY_WORKER]
    result = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1 and "RuntimeError: a bug" in result.stderr
