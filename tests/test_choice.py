"""The choice of the box in one operator against its plain version, and where it is used."""

from __future__ import annotations

import pytest
import torch

from dmv_fast.model.dmv import DMV, DMVConfig, Prediction
from dmv_fast.model.pick import PickConfig, cosine_window
from dmv_fast.ops.backends import cpu_operator_runs
from dmv_fast.runtime import choice
from dmv_fast.runtime.frame import FrameStep
from dmv_fast.runtime.network import FastNetwork, PlainNetwork
from dmv_fast.vision.boxes import anchor_grid

RATIOS = (1 / 3, 1 / 2, 1, 2, 3)
A, GRID = len(RATIOS), 6
ANCHORS = anchor_grid(GRID, 256, RATIOS, 64)
WINDOW = cosine_window(A, GRID).contiguous()
SIZES = torch.tensor([[60.0, 50.0], [20.0, 90.0], [64.0, 64.0], [3.0, 250.0], [100.0, 7.0]])

needs_extension = pytest.mark.skipif(
    not cpu_operator_runs("choose_box_cpu"), reason="the C++ extension is not loaded"
)


def some_prediction(n: int, *, channels_last: bool, scale: float = 1.0) -> Prediction:
    answer = scale * torch.randn(n, 5 * A, GRID, GRID, generator=torch.Generator().manual_seed(n))
    if channels_last:
        answer = answer.to(memory_format=torch.channels_last)
    return Prediction(answer[:, :A], answer[:, A:].unflatten(1, (A, 4)))


@needs_extension
@pytest.mark.parametrize("config", [PickConfig(), PickConfig(smoothing=1.0), PickConfig(0.5, 0.0, 0.3)])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_operator_chooses_as_the_plain_version_does(config, channels_last, n, scale):
    """At scale 10 most sizes are cut and many scores are 1 to the last bit."""
    prediction = some_prediction(n, channels_last=channels_last, scale=scale)
    found, scores = choice.choose(prediction, ANCHORS, WINDOW, SIZES[:n], config)
    expected, all_scores = choice.choose_reference(prediction, ANCHORS, WINDOW, SIZES[:n], config)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(scores, all_scores)


@needs_extension
def test_of_equal_ranks_the_first_is_chosen():
    zero = Prediction(torch.zeros(1, A, GRID, GRID), torch.zeros(1, A, 4, GRID, GRID))
    bare = PickConfig(size_penalty=0.0, window=0.0, smoothing=1.0)
    found, _ = choice.choose(zero, ANCHORS, WINDOW, SIZES[:1], bare)
    torch.testing.assert_close(found[0, :4], ANCHORS[0, 0, 0])


@needs_extension
@pytest.mark.parametrize("where", ["logits", "deltas"])
def test_a_number_that_is_none_is_not_hidden(where):
    """As in the plain version, the answer is NaN, so that the target counts as lost."""
    prediction = some_prediction(2, channels_last=True)
    getattr(prediction, where)[1, 2, 3, 2] = torch.nan  # one location; of deltas, a row of heights
    found, _ = choice.choose(prediction, ANCHORS, WINDOW, SIZES[:2], PickConfig())
    expected, _ = choice.choose_reference(prediction, ANCHORS, WINDOW, SIZES[:2], PickConfig())
    assert expected[1].isnan().any() and not expected[0].isnan().any()
    torch.testing.assert_close(found, expected, equal_nan=True)


@needs_extension
def test_wrong_tensors_are_refused():
    logits, deltas = some_prediction(2, channels_last=True)
    choose = torch.ops.dmv_fast.choose_box_cpu.default
    terms = 0.03, 0.1, 0.7
    for wrong, says in (
        ((logits[0], deltas, ANCHORS, WINDOW, SIZES[:2]), "logits, deltas: must be"),
        ((logits, deltas[:, :, :3], ANCHORS, WINDOW, SIZES[:2]), "deltas: must be"),
        ((logits.double(), deltas, ANCHORS, WINDOW, SIZES[:2]), "must be float32"),
        ((logits, deltas, ANCHORS[1:], WINDOW, SIZES[:2]), "anchors: must be"),
        ((logits, deltas, ANCHORS, WINDOW[0], SIZES[:2]), "window: must be"),
        ((logits, deltas, ANCHORS, WINDOW, SIZES[:1]), "sizes: must be"),
    ):
        with pytest.raises(RuntimeError, match=says):
            choose(*wrong, *terms)


def test_the_plain_network_chooses_plainly():
    """`backend="reference"` in float32 says what is correct: no operator of ours has a part in it."""
    model = DMV(DMVConfig()).eval().requires_grad_(False)
    plain, fast = PlainNetwork(model, backend="reference"), FastNetwork(
        model, dtype=torch.float32, device=torch.device("cpu"), backend="auto"
    )
    steps = [FrameStep(network, k=4, capacity=1, pick=PickConfig()) for network in (plain, fast)]
    assert [step._choose for step in steps] == [choice.choose_reference, choice.choose]
