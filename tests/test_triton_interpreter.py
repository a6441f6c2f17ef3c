"""The Triton kernels under Triton's interpreter, on the CPU: the retrieval contract where no GPU is needed.

The interpreter has no bfloat16 (its products are of bit patterns); tests/test_triton_gpu.py has.
"""

from __future__ import annotations

import pytest
import torch
from interpreted import INTERPRETED, run_again, skip_without_loops

triton = pytest.importorskip("triton")

if not INTERPRETED:

    def test_under_the_interpreter():
        run_again(__file__)

else:
    from dmv_fast.kernels.gather import gather_candidates
    from dmv_fast.kernels.retrieve import retrieve
    from dmv_fast.kernels.tiles import Tiles
    from reference_retrieval import assert_exact, exact_logits

    skip_without_loops()
    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of inf - inf

    RESIDENT = Tiles(rows=16, columns=32, depth=64, group=4, warps=4, stages=2, splits=3, select_rows=16)
    STREAMED = Tiles(rows=16, columns=64, depth=32, group=8, warps=4, stages=2, splits=2, select_rows=16)
    BOTH = pytest.mark.parametrize("tiles", [RESIDENT, STREAMED], ids=["resident", "streamed"])

    def random_pair(batch, m, n, d, dtype=torch.float32, scale=1.0):
        """query and keys whose logits have a standard deviation of about ``scale``."""
        torch.manual_seed(m * 1000 + n + d)
        query = (torch.randn(batch, m, d) * scale / d**0.5).to(dtype)
        return query, torch.randn(batch, n, d).to(dtype)

    def counts(*valid):
        return torch.tensor(valid, dtype=torch.int32)

    @pytest.mark.parametrize(
        ("m", "n", "d", "k", "dtype", "tiles"),
        [
            (1, 1, 64, 1, torch.float16, RESIDENT),
            (17, 131, 64, 4, torch.float16, RESIDENT),
            (9, 333, 128, 3, torch.float16, STREAMED),
            (5, 200, 256, 32, torch.float32, RESIDENT._replace(depth=256, columns=64)),
            (5, 251, 512, 4, torch.float16, STREAMED._replace(depth=128)),
            (3, 97, 100, 17, torch.float32, STREAMED),
            (3, 97, 40, 8, torch.float16, RESIDENT),
            (2, 5, 64, 32, torch.float32, STREAMED),
        ],
    )
    def test_sizes(m, n, d, k, dtype, tiles):
        query, keys = random_pair(1, m, n, d, dtype, scale=3.0)
        assert_exact(query, keys, k, *retrieve(query, keys, k, tiles=tiles))

    @BOTH
    @pytest.mark.parametrize("k", [1, 4, 32])
    def test_how_many_keys_exist_is_read_from_a_tensor(tiles, k):
        """0, 1, k - 1, k, a whole tile and not, all; behind lies poison. One call, a count an item."""
        valid = counts(0, 1, k - 1, k, 64, 65, 130)
        query, keys = random_pair(7, 2, 130, 64)
        bank = keys.clone()
        for item, count in enumerate(valid):
            bank[item, count:] = torch.nan
        assert_exact(query, keys, k, *retrieve(query, bank, k, valid, tiles=tiles), valid)

    @BOTH
    @pytest.mark.parametrize("k", [1, 4, 31])
    def test_small_integers_give_exact_sets(tiles, k):
        """Such products are exact: the values returned are the k highest to the bit, ties and all."""
        generator = torch.Generator().manual_seed(k)
        query = torch.randint(-2, 3, (1, 9, 64), generator=generator)
        keys = torch.randint(-1, 2, (1, 230, 64), generator=generator)
        _, indices = retrieve(query.half(), keys.half(), k, tiles=tiles)
        logits = exact_logits(query, keys)
        got = logits.gather(-1, indices.long() + 1)
        assert torch.equal(got, logits.sort(dim=-1, descending=True).values[..., :k])
        assert all(len(set(row.tolist())) == k for row in indices[0])

    @BOTH
    def test_all_keys_equal(tiles):
        keys = torch.full((1, 1, 64), 0.5).expand(1, 177, 64).contiguous()
        for value in (0.25, 0.0, -0.25, 1000.0):
            query = torch.full((1, 2, 64), value)
            assert_exact(query, keys, 5, *retrieve(query, keys, 5, tiles=tiles))

    @BOTH
    def test_logits_that_exp_cannot_hold(tiles):
        query, keys = random_pair(1, 8, 150, 64, torch.float16)
        for factor in (2.0**11, 2.0**-11):
            assert_exact(query * factor, keys, 4, *retrieve(query * factor, keys, 4, tiles=tiles))

    @BOTH
    def test_null_wins_everywhere_or_nowhere(tiles):
        query, keys = torch.rand(1, 6, 64) + 0.5, torch.rand(1, 100, 64) + 0.5
        scores, indices = retrieve(query, -keys, 4, tiles=tiles)
        assert (indices[..., 0] == -1).all() and (scores[..., 0] > 0.99).all()
        assert_exact(query, -keys, 4, scores, indices)
        scores, indices = retrieve(query, keys, 4, tiles=tiles)
        assert (indices >= 0).all()
        assert_exact(query, keys, 4, scores, indices)

    @BOTH
    @pytest.mark.parametrize("poison", [torch.nan, torch.inf])
    def test_a_bad_row_keeps_to_itself(tiles, poison):
        query, keys = random_pair(2, 20, 90, 64)
        clean_scores, clean_indices = retrieve(query, keys, 4, tiles=tiles)
        query[0, 7, 3] = poison
        scores, indices = retrieve(query, keys, 4, tiles=tiles)
        assert scores[0, 7].isnan().any()
        assert (indices >= -1).all() and (indices < 90).all()
        scores[0, 7], indices[0, 7] = clean_scores[0, 7], clean_indices[0, 7]
        assert torch.equal(scores, clean_scores) and torch.equal(indices, clean_indices)

    def test_nothing_unwritten_is_read_or_returned():
        """New tensors, scratch too, start as NaN or the largest integer."""
        query, keys = random_pair(2, 18, 150, 64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert torch.empty(1).isnan().all()
            for valid in (None, counts(0, 70)):
                assert_exact(query, keys, 5, *retrieve(query, keys, 5, valid, tiles=RESIDENT), valid)
        finally:
            torch.use_deterministic_algorithms(False)

    @BOTH
    def test_same_bits_from_run_to_run_and_for_any_split(tiles):
        query, keys = random_pair(1, 20, 300, 64, torch.float16)
        scores, indices = retrieve(query, keys, 8, tiles=tiles)
        for splits in (1, tiles.splits, 7):
            again = retrieve(query, keys, 8, tiles=tiles._replace(splits=splits))
            assert torch.equal(again[0], scores) and torch.equal(again[1], indices)

    def test_order_of_the_keys_does_not_matter():
        query, keys = random_pair(1, 16, 211, 64, scale=4.0)
        order = torch.randperm(211)
        scores, indices = retrieve(query, keys, 8, tiles=RESIDENT)
        permuted_scores, permuted = retrieve(query, keys[:, order], 8, tiles=RESIDENT)
        assert torch.equal(torch.where(permuted < 0, -1, order[permuted.clamp(min=0).long()].int()), indices)
        torch.testing.assert_close(permuted_scores, scores, rtol=1e-5, atol=1e-9)

    def test_a_bank_is_read_in_place():
        """Rows of a larger, batch-strided bank, and a query with its channels first."""
        query, keys = random_pair(2, 9, 100, 48, torch.float16)
        bank = torch.full((2, 120, 64), torch.nan, dtype=torch.float16)
        bank[:, :100, :48] = keys
        valid = counts(100, 99)
        scores, indices = retrieve(query.mT.contiguous().mT, bank[:, :, :48], 6, valid, tiles=RESIDENT)
        assert_exact(query, keys, 6, scores, indices, valid)

    def test_its_own_tiles():
        """Whatever ``choose_tiles`` takes for this device runs too."""
        query, keys = random_pair(1, 3, 40, 64)
        assert_exact(query, keys, 4, *retrieve(query, keys, 4))

    @pytest.mark.parametrize(("k", "width", "dtype"), [(1, 64, torch.float32), (5, 97, torch.float16)])
    def test_gather(k, width, dtype):
        torch.manual_seed(k)
        shapes = (2, 12, width), (width,), (2, 6, width)
        values, null_value, query_part = (torch.randn(shape).to(dtype) for shape in shapes)
        indices = torch.randint(-1, 12, (2, 6, k), dtype=torch.int32)
        scores = torch.rand(2, 6, k) + 0.01
        rows = gather_candidates(values, null_value, query_part, indices, scores)
        table = torch.cat([null_value.expand(2, 1, -1), values], dim=1).double()
        selected = table[torch.arange(2).view(-1, 1, 1), indices.long() + 1]
        weights = k * scores.double() / scores.double().sum(-1, keepdim=True)
        want = weights.unsqueeze(-1) * selected + query_part.double().unsqueeze(2)
        assert rows.dtype == dtype
        step = 4 * max(torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(rows.double(), want, rtol=step, atol=step)
