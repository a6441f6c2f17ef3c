"""The network as a frame needs it: four calls, by the plain reference or folded and fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmv_fast import ops
from dmv_fast.model.dmv import DMV, Prediction
from dmv_fast.model.head import BoxHead
from dmv_fast.model.memory import ValueEncoder
from dmv_fast.ops.screened import pack_keys, packed_width, retrieve_screened, screening_runs
from dmv_fast.runtime.convolution import Convolution, Where, padding_of, run_chain
from dmv_fast.runtime.fold import fold_vote
from dmv_fast.runtime.parts import Products
from dmv_fast.runtime.rows import Projection, with_length
from dmv_fast.runtime.trunk import Trunk
from dmv_fast.runtime.vote import Candidates, MeanBeside, Vote, fused_vote
from dmv_fast.vision.crop import normalise

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Network(Protocol):
    """What FrameStep runs. maps: (B, H, W, D or more) of `dtype`, the features first."""

    model: DMV
    """The reference, float32: its geometry, its anchors, how it codes boxes."""
    dtype: torch.dtype
    device: torch.device
    key_width: int
    """Of a key in the memory ..."""
    key_dtype: torch.dtype
    """... and its number format."""
    value_width: int
    """Of a value in the memory, which is of `dtype`."""

    def look(self, crops: Tensor) -> Tensor:
        """crops (B, 256, 256, 3) uint8 BGR -> maps."""

    def match(self, maps: Tensor, keys: Tensor, k: int, valid: Tensor | int) -> tuple[Tensor, Tensor]:
        """The K best keys of each location: scores and indices (B, M, K) as ops.retrieve's."""

    def predict(self, maps: Tensor, keys: Tensor, values: Tensor, k: int, valid: Tensor | int) -> Prediction:
        """keys (B, N, key_width), values (B, N, value_width), valid as in ops.retrieve -> float32 maps."""

    def remember(self, maps: Tensor, scores: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """As DMV.remember: keys (B, M, key_width), values (B, M, value_width)."""


class PlainNetwork:
    """The reference as it stands in dmv_fast.model."""

    dtype = key_dtype = torch.float32

    def __init__(self, model: DMV, *, backend: str):
        self.model, self._backend = model, backend
        self.device = model.anchors.device
        self.key_width, self.value_width = model.config.key_dim, model.config.value_dim

    def look(self, crops: Tensor) -> Tensor:
        return self.model.backbone(normalise(crops)).permute(0, 2, 3, 1)

    def match(self, maps: Tensor, keys: Tensor, k: int, valid: Tensor | int) -> tuple[Tensor, Tensor]:
        query = self.model.read.query(maps.permute(0, 3, 1, 2))
        return ops.retrieve(query, keys, k, valid=valid, backend=self._backend)

    def predict(self, maps: Tensor, keys: Tensor, values: Tensor, k: int, valid: Tensor | int) -> Prediction:
        return self.model(maps.permute(0, 3, 1, 2), keys, values, k=k, valid=valid, backend=self._backend)

    def remember(self, maps: Tensor, scores: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.remember(maps.permute(0, 3, 1, 2), scores, deltas)


class FastNetwork:
    """The folded network, equal to the reference within the rounding of its `dtype`.

    The memory holds values as the voting net reads them: C wide, projected once, when written, or all that
    it makes of them (see SpreadVote, MeanBeside). The last V channels of its maps are room for what is
    retrieved, so that the head reads both as one map.

    products: of float32, how large ones are made (see Convolution); of whole numbers in the backbone and in
    the vote's last layer alone.
    Where products of bytes screen the keys, they are stored packed for that (ops.screened).
    """

    def __init__(
        self, model: DMV, *, dtype: torch.dtype, device: torch.device, backend: str,
        products: Products = "own",
    ):
        self.model = model
        self.dtype, self.device, self._backend = dtype, device, backend
        where = Where(dtype=dtype, device=device, products=products)
        weights = fold_vote(model.read)
        self._cosine = model.read.similarity == "cosine"
        self._pack_keys = (
            (dtype, device.type) == (torch.float32, "cpu")
            and backend in ("auto", "cpu")
            and model.config.key_dim % 32 == 0
            and self._cosine
            and screening_runs()
        )
        depth = model.config.key_dim
        self.key_width, self.key_dtype = (
            (packed_width(depth), torch.uint8) if self._pack_keys else (depth, dtype)
        )
        self._trunk = Trunk(model.backbone, **where)
        vote, value_in = fused_vote(weights, backend=backend, **where), weights.value_in
        if products == "int16":  # the rest reads scores and sizes beside features: no one scale suits both
            where["products"] = "own"
        self._vote: Vote = vote
        if model.read.mean_beside:
            self._vote = MeanBeside(vote, model.read.null_value.to(device, dtype), backend)
            value_in = torch.cat([value_in, torch.eye(model.config.value_dim, device=value_in.device)])
        self.value_width = self._vote.width
        self._query_in = Projection(weights.query_in, weights.query_bias, dtype=dtype, device=device)
        self._temperature = float(model.read.log_temperature.exp())  # used by "cosine" alone
        self._head, bias = _fold_head(model.head, **where)
        self._head_bias = bias.float().to(device)
        self._encoder = _Encoder(model.value_encoder, value_in, **where)

    def look(self, crops: Tensor, maps: Tensor | None = None) -> Tensor:
        """As Network.look; maps: where to put them, of the size of `new_maps`."""
        c = self.model.config
        maps = self.new_maps(len(crops)) if maps is None else maps
        self._trunk(crops, maps[..., : c.key_dim])
        return maps

    def new_maps(self, batch: int) -> Tensor:
        """Room for the maps of that many crops, filled with anything."""
        c = self.model.config
        size = (batch, c.grid, c.grid, c.key_dim + c.value_dim)
        return torch.empty(size, dtype=self.dtype, device=self.device)

    def predict(self, maps: Tensor, keys: Tensor, values: Tensor, k: int, valid: Tensor | int) -> Prediction:
        candidates = self.gather(maps, values, *self.match(maps, keys, k, valid))
        self.vote(maps, candidates)
        return self.head(maps)

    # ---- predict's stages, apart so that each can be timed -------------------------------------------

    def match(self, maps: Tensor, keys: Tensor, k: int, valid: Tensor | int) -> tuple[Tensor, Tensor]:
        query = self._with_length(self._features(maps), self._temperature)
        if self._pack_keys:
            return retrieve_screened(query, keys, k, valid=valid)
        return ops.retrieve(query, keys, k, valid=valid, backend=self._backend)

    def gather(self, maps: Tensor, values: Tensor, scores: Tensor, indices: Tensor) -> Candidates:
        """The candidates, weighted and with the location's own part, as the vote takes them."""
        return self._vote.gather(values, self._query_in(self._features(maps)), indices, scores)

    def vote(self, maps: Tensor, candidates: Candidates) -> None:
        """Candidates agree on one value, put behind the features."""
        self._vote(candidates, maps.flatten(1, 2)[..., self.model.config.key_dim :])

    def head(self, maps: Tensor) -> Prediction:
        """Features and retrieved values to logits and deltas, float32."""
        anchors = len(self.model.config.anchor_ratios)
        answer = run_chain(self._head, maps)[..., : len(self._head_bias)] + self._head_bias
        answer = answer.permute(0, 3, 1, 2)  # (B, 5 A, H, W)
        return Prediction(answer[:, :anchors], answer[:, anchors:].unflatten(1, (anchors, 4)))

    def _features(self, maps: Tensor) -> Tensor:
        return maps[..., : self.model.config.key_dim].flatten(1, 2)  # (B, M, D), not a copy

    def remember(self, maps: Tensor, scores: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        features = maps[..., : self.model.config.key_dim]
        scores = scores.masked_fill(scores < ValueEncoder.score_floor, 0.0)
        soft = torch.cat([scores, deltas.flatten(1, 2)], 1).permute(0, 2, 3, 1).to(self.dtype)
        soft = F.pad(soft, (0, -(features.shape[-1] + soft.shape[-1]) % 32))
        values = self._vote.store(self._encoder(torch.cat([features, soft], -1)))
        keys = self._with_length(features.flatten(1, 2), 1.0)
        return pack_keys(keys) if self._pack_keys else keys, values

    def _with_length(self, rows: Tensor, length: float) -> Tensor:
        """rows (B, M, D) at that length ("cosine"), or as they are ("dot")."""
        return with_length(rows, length) if self._cosine else rows.contiguous()


def _fold_head(head: BoxHead, **where: Unpack[Where]) -> tuple[list[Convolution], Tensor]:
    """Both branches side by side: (B, H, W, D + V) -> (B, H, W, A + 4 A or more), logits first.

    The last bias is left to be added, in float32. Channels are filled up to 32s, the matrix units' measure.
    """

    def both(place: int) -> tuple[list[Tensor], Tensor]:
        """Weights at a place of the centre's and the box's branch; their biases, one behind the other."""
        pairs = [_weight_and_bias(branch[place]) for branch in (head.centre, head.box)]
        return [weight for weight, _ in pairs], torch.cat([bias for _, bias in pairs])

    (first, bias1), (second, bias2), (last, bias) = (both(place) for place in (0, 2, 4))
    # The last ones are 1 x 1, on neighbouring halves of the channels.
    weight = torch.block_diag(*(w[:, :, 0, 0] for w in last))[:, :, None, None]
    weight = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, -len(weight) % 32))
    convolutions = [
        Convolution(torch.cat(first), bias1, relu=True, padding=1, **where),
        Convolution(torch.cat(second), bias2, relu=True, padding=1, groups=2, **where),
        Convolution(weight, None, relu=False, **where),
    ]
    return convolutions, bias


def _weight_and_bias(conv: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    return conv.weight, conv.bias


class _Encoder:
    """ValueEncoder with a projection behind it, the voting net's to C: (B, H, W, D + 5 A) -> (B, M, C).

    Of x the channels are filled up to 32s, the matrix units' measure.
    """

    def __init__(self, encoder: ValueEncoder, value_in: Tensor, **where: Unpack[Where]):
        conv1, conv2, norm = encoder.conv1, encoder.conv2, encoder.norm
        # The layer norm's mean is taken out of the convolution, its scale and shift go into the projection.
        weight2, bias2 = _weight_and_bias(conv2)
        centred = weight2 - weight2.mean(0), bias2 - bias2.mean()
        weight = F.pad(conv1.weight, (0, 0, 0, 0, 0, -conv1.in_channels % 32))
        first = Convolution(weight, conv1.bias, relu=True, padding=padding_of(conv1), **where)
        second = Convolution(*centred, relu=False, padding=padding_of(conv2), **where)
        self._convolutions = [first, second]
        dtype, device = where["dtype"], where["device"]
        self._projection = Projection(
            value_in * norm.weight, value_in @ norm.bias, epsilon=norm.eps, dtype=dtype, device=device
        )

    def __call__(self, x: Tensor) -> Tensor:
        return self._projection(run_chain(self._convolutions, x).flatten(1, 2))
