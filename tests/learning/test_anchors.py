"""Equal observations have equal numbers, whatever they are made of; different ones never do."""

import numpy as np
import pytest
import torch

from embodied_rft.data import PAST, Past, Ragged
from embodied_rft.learning.anchors import anchors

PICTURES = [np.full((2, 3, 3), k, np.uint8) for k in (0, 1, 0)]
TURNED = np.zeros((3, 2, 3), np.uint8)  # the same bytes in another shape
COLUMNS = {
    "numbers": (torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]), [0, 1, 0]),
    "numbers in two halves": (torch.tensor([[1, 256], [256, 1], [1, 256]]), [0, 1, 0]),
    "frames": (np.stack(PICTURES), [0, 1, 0]),
    "symbols": (torch.tensor([7, 7, 8]), [0, 0, 1]),
    "nothing": (np.zeros((3, 0), np.float32), [0, 0, 0]),
    "texts": (["a", "b", "a"], [0, 1, 0]),
    "ragged": (Ragged.of([[1, 2], [1], [1, 2]], np.int64), [0, 1, 0]),
    "pictures": ([[PICTURES[0]], [PICTURES[1]], [PICTURES[2]]], [0, 1, 0]),
    "lists of pictures": ([[PICTURES[0], PICTURES[1]], [PICTURES[1], PICTURES[0]], [PICTURES[0]]], [0, 1, 2]),
    "pictures of other shapes": ([[PICTURES[0]], [TURNED], []], [0, 1, 2]),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_contents(name):
    column, expected = COLUMNS[name]
    assert anchors({"seen": column}).tolist() == expected


def test_the_state_is_compared_where_there_is_one_and_never_the_past():
    past = Past(Ragged.of([[], [0], []]), {"message": ["x"]}, ["y"], {})
    seen = {"message": ["a", "b", "c"], "state": np.array([[1], [1], [2]]), PAST: past}
    assert anchors(seen).tolist() == [0, 0, 1]
    assert anchors(seen, ["message"]).tolist() == [0, 1, 2]
    assert anchors({**seen, "state": np.zeros(3)}, ["state", "message"]).tolist() == [0, 1, 2]
    assert anchors({"message": ["a", "a", "c"], PAST: past}).tolist() == [0, 0, 1]
    for wrong in (["sate"], [PAST], []):
        with pytest.raises(ValueError, match=r"state|name at least one"):
            anchors(seen, wrong)
