"""The loss of eq. 2-5 against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dmv_fast.model.dmv import Prediction
from dmv_fast.training.loss import SMOOTH_L1_BETA, frame_loss, hard_negatives, label
from dmv_fast.vision import boxes


def grid_of_squares(columns: int) -> torch.Tensor:
    """One row of disjoint 10 x 10 anchors: (1, 1, columns, 4)."""
    return torch.tensor([[[[20.0 * i, 0, 10, 10] for i in range(columns)]]])


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_labels_by_iou():
    anchors = torch.tensor([[[[0.0, 0, 10, 10], [2, 0, 10, 10], [4, 0, 10, 10], [5, 0, 10, 10]]]])
    labels = label(torch.tensor([[0.0, 0, 10, 10]]), anchors)  # IoU 1, 0.667, 0.429, 0.333
    assert labels.positive.flatten().tolist() == [True, True, False, False]
    assert labels.negative.flatten().tolist() == [False, False, False, True]


def test_the_best_anchor_is_positive_however_poor():
    labels = label(torch.tensor([[8.0, 0, 4, 10]]), grid_of_squares(3))  # IoU 2/12 with the first at most
    assert labels.positive.flatten().tolist() == [True, False, False]
    assert labels.negative.flatten().tolist() == [False, True, True]


def test_absent_target_has_no_positive():
    labels = label(torch.full((1, 4), float("nan")), grid_of_squares(3))
    assert not labels.positive.any() and labels.negative.all()


def test_three_hardest_negatives_a_positive():
    anchors = grid_of_squares(6)
    labels = label(torch.tensor([[0.0, 0, 10, 10]]), anchors)
    logits = torch.tensor([[[[9.0, 0.1, 0.5, -3, 0.4, 0.2]]]])
    assert hard_negatives(logits, labels).flatten().tolist() == [False, False, True, False, True, True]


def test_centre_loss_by_hand():
    """Eq. 4: -(1 - 0.8)^2 log 0.8 - 0.3^2 log 0.7 - 0.6^2 log 0.4 - 0.1^2 log 0.9."""
    anchors = grid_of_squares(5)
    logits = torch.tensor([[[[logit(0.8), logit(0.3), logit(0.6), logit(0.1), logit(0.05)]]]])
    box = torch.tensor([[0.0, 0, 10, 10]])
    loss = frame_loss(Prediction(logits, torch.zeros(1, 1, 4, 1, 5)), box, anchors)
    expected = -0.04 * math.log(0.8) - 0.09 * math.log(0.7) - 0.36 * math.log(0.4) - 0.01 * math.log(0.9)
    assert loss.centre.item() == pytest.approx(expected, rel=1e-5)
    assert loss.box.item() == 0  # the anchor is the box


def test_box_loss_by_hand():
    """Eq. 5, at the positive anchor only: deltas (0.2, 0, log 1.2, 0), smooth L1 with its knee at beta."""
    anchors = grid_of_squares(4)
    box = torch.tensor([[1.0, 0, 12, 10]])  # centre (7, 5): dx = 0.2, log size 1.2 and 1
    deltas = torch.full((1, 1, 4, 1, 4), 5.0)
    deltas[..., 0] = 0.0
    loss = frame_loss(Prediction(torch.zeros(1, 1, 1, 4), deltas), box, anchors, box_weight=2.0)
    expected = sum(d - SMOOTH_L1_BETA / 2 for d in (0.2, math.log(1.2)))
    assert loss.box.item() == pytest.approx(expected, rel=1e-5)
    assert loss.total.item() == pytest.approx(loss.centre.item() + 2 * expected, rel=1e-5)


def test_loss_is_divided_by_the_positives_of_its_own_frame():
    anchors = boxes.anchor_grid(16, 256, (0.5, 1.0, 2.0), 64.0)
    one = torch.tensor([[100.0, 90, 60, 70]])
    prediction = Prediction(torch.randn(1, 3, 16, 16), torch.randn(1, 3, 4, 16, 16))
    alone = frame_loss(prediction, one, anchors)
    absent = torch.full((1, 4), float("nan"))
    both = frame_loss(Prediction(*(torch.cat([x, x]) for x in prediction)), torch.cat([one, absent]), anchors)
    assert both.total[0].item() == pytest.approx(alone.total.item())
    assert both.total.isfinite().all() and both.box[1] == 0


def test_extreme_logits_stay_finite():
    anchors = grid_of_squares(3)
    logits = torch.tensor([[[[-200.0, 200.0, 0.0]]]], requires_grad=True)
    deltas = torch.zeros(1, 1, 4, 1, 3, requires_grad=True)
    loss = frame_loss(Prediction(logits, deltas), torch.tensor([[0.0, 0, 10, 10]]), anchors)
    loss.total.sum().backward()
    assert loss.total.isfinite().all() and logits.grad.isfinite().all()
