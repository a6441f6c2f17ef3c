"""The CUDA retrieval's own source on a CPU (cuda_emulation/): the tests of every backend, AddressSanitizer,
ThreadSanitizer, and planted bugs that have to be noticed."""

from __future__ import annotations

import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_retrieve
import torch
from cuda_emulation.emulator import CSRC, DTYPES, H200, RTX4090, Emulator, build, one_block_device, starts
from reference_retrieval import assert_exact, exact_logits

import dmv_fast.ops  # noqa: F401  (registers the operator)

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux" or not shutil.which("g++"),
    reason="the emulation wants Linux on x86-64 and g++",
)
FLAVOURS = ("address", "thread")


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("emulation")
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda flavour: build(folder / flavour, flavour), FLAVOURS)
        return dict(zip(FLAVOURS, built, strict=True))


def require_sanitizer(program: Path) -> None:
    if not starts(program):
        pytest.skip("this machine does not let the sanitizer start")


@pytest.fixture
def emulator(programs):
    """Under AddressSanitizer; whatever it has to say at the end is an error."""
    require_sanitizer(programs["address"])
    emulator = Emulator(programs["address"])
    yield emulator
    assert emulator.close() == ""


@pytest.fixture
def as_operator(emulator, monkeypatch):
    """``ops.retrieve(..., backend="cuda")`` on CPU tensors reaches the emulated kernel."""
    dispatch = sys.modules["dmv_fast.ops.retrieve"]
    monkeypatch.setattr(dispatch, "check_backend", lambda backend, device_type: backend)
    monkeypatch.setattr(test_retrieve, "device_of", lambda backend: "cpu")
    monkeypatch.setattr(sys.modules["reference_retrieval"], "device_of", lambda backend: "cpu")
    library = torch.library.Library("dmv_fast", "FRAGMENT")
    if not hasattr(torch.ops.dmv_fast, "retrieve_cuda"):
        library.define("retrieve_cuda(Tensor query, Tensor keys, int k, Tensor? valid) -> (Tensor, Tensor)")
    library.impl("retrieve_cuda", emulator.retrieve, "CPU")
    yield emulator
    library._destroy()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_random_sizes", ()),
        ("test_odd_sizes", (1, 1, 64, 1)),
        ("test_odd_sizes", (1, 5, 512, 32)),
        ("test_odd_sizes", (3, 513, 256, 1)),
        ("test_odd_sizes", (40, 1500, 64, 4)),
        ("test_odd_sizes", (31, 1100, 33, 17)),
        ("test_fewer_keys_than_k", (1,)),
        ("test_fewer_keys_than_k", (4,)),
        ("test_fewer_keys_than_k", (32,)),
        ("test_small_integers_give_exact_sets", ()),
        ("test_all_keys_equal", (4,)),
        ("test_all_keys_equal", (32,)),
        ("test_every_key_is_better_than_all_before", (1,)),
        ("test_every_key_is_better_than_all_before", (32,)),
        ("test_logits_that_exp_cannot_hold", ()),
        ("test_null_wins_everywhere_or_nowhere", ()),
        ("test_every_output_is_written", ()),
        ("test_a_bank_is_read_in_place", ()),
        ("test_a_bad_row_keeps_to_itself", (torch.nan,)),
        ("test_a_bad_row_keeps_to_itself", (torch.inf,)),
        ("test_order_of_the_keys_does_not_matter", ()),
    ],
)
def test_what_every_backend_promises(as_operator, name, arguments):
    torch.manual_seed(0)
    getattr(test_retrieve, name)("cuda", *arguments)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 16, 32])
def test_smaller_index_first_among_equals_however_split(emulator, k):
    torch.manual_seed(k)
    query, keys = torch.randint(-2, 3, (1, 35, 32)), torch.randint(-1, 2, (1, 700, 32))
    order = exact_logits(query, keys).sort(dim=-1, descending=True, stable=True).indices[..., :k] - 1
    for dtype in DTYPES:
        query, keys = query.to(dtype), keys.to(dtype)
        for emulator.device in (H200, RTX4090._replace(multiprocessors=2), one_block_device(query, k)):
            _, indices = emulator.retrieve(query, keys, k, None)
            assert torch.equal(indices.long(), order), emulator.plan


def test_same_bits_whatever_runs_first(emulator):
    torch.manual_seed(0)
    query, keys = torch.randn(2, 40, 64).bfloat16(), torch.randn(2, 333, 64).bfloat16()
    for emulator.device in (H200, one_block_device(query, 9)):
        emulator.backwards = False
        scores, indices = emulator.retrieve(query, keys, 9, None)
        emulator.backwards = True
        again = emulator.retrieve(query, keys, 9, None)
        assert torch.equal(again[0], scores) and torch.equal(again[1], indices)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_every_depth_of_the_pipeline(emulator, stages):
    """With fewer chunks than stages, as many, and more."""
    torch.manual_seed(stages)
    for depth in (64, 200, 512):
        for dtype in DTYPES:
            query, keys = torch.randn(1, 40, depth).to(dtype), torch.randn(1, 300, depth).to(dtype)
            emulator.device = one_block_device(query, 4, stages)
            scores, indices = emulator.retrieve(query, keys, 4, None)
            assert emulator.plan.stages == stages and emulator.plan.splits == 1
            assert_exact(query, keys, 4, scores, indices)


def test_as_many_splits_as_the_merge_can_read(emulator):
    torch.manual_seed(0)
    query, keys = torch.randn(1, 1, 16).bfloat16(), torch.randn(1, 127 * 128, 16).bfloat16()
    for count in (None, 127 * 128 - 1, 0):
        valid = None if count is None else torch.tensor([count], dtype=torch.int32)
        scores, indices = emulator.retrieve(query, keys, 32, valid)
        assert emulator.plan.splits == 127
        assert_exact(query, keys, 32, scores, indices, valid)


@pytest.mark.parametrize(
    ("n", "k", "most"), [(128, 1, 1), (128, 4, 8), (128, 32, 75), (1024, 4, 18), (1024, 32, 145)]
)
def test_few_logits_come_before_a_list(emulator, n, k, most):
    """What the speed rests on. In random order k (1 + ln(n / k)) of n logits are among the k best so far."""
    torch.manual_seed(0)
    query, keys = torch.randn(1, 128, 64).bfloat16(), torch.randn(1, n, 64).bfloat16()
    emulator.device = one_block_device(query, k)
    emulator.retrieve(query, keys, k, None)
    assert emulator.plan.splits == 1 and k <= emulator.offered / 128 <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_races(programs, dtype):
    """Barriers order every access to shared memory, in blocks of two warps and several tiles."""
    require_sanitizer(programs["thread"])
    torch.manual_seed(0)
    emulator = Emulator(programs["thread"])
    query, keys = torch.randn(1, 60, 72).to(dtype), torch.randn(1, 300, 72).to(dtype)
    valid = torch.tensor([290], dtype=torch.int32)
    for stages in (2, 4):
        emulator.device = one_block_device(query, 5, stages)
        emulator.backwards = not emulator.backwards
        assert_exact(query, keys, 5, *emulator.retrieve(query, keys, 5, valid), valid)
    assert emulator.close() == ""


# file, what it says, what it says instead, who notices
SELECT, KERNEL = "retrieve_select.cuh", "retrieve_kernel.cuh"
PLANTED = [
    (KERNEL, "__syncthreads();  // the stage is there", "// the stage is there", "thread"),
    (KERNEL, "__syncthreads();  // all are done with the last", "// all are done with the last", "thread"),
    (SELECT, "__syncwarp();  // the survivors are written", "", "thread"),
    (SELECT, "__syncwarp();  // the survivors are read", "", "thread"),
    (KERNEL, "wait_for_copies<2>();", "wait_for_copies<3>();", "address"),
    (KERNEL, "from + i * matrix.row_stride, i < rows", "from + i * matrix.row_stride, i <= rows", "address"),
    (SELECT, "lowest = fminf(lowest, group[g])", "lowest = fmaxf(lowest, group[g])", "address"),
    ("retrieve_plan.h", "kRowBytes + k * 8)", "kRowBytes + k * 4)", "address"),
    ("topk_list.cuh", "index < other_index", "index > other_index", "address"),
]
NOTICED = "Sanitizer|emulation: |among the k highest|returned twice|scores are off|in order"


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> list[Path]:
    def build_one(number: int) -> Path:
        name, good, bad, flavour = PLANTED[number]
        folder = tmp_path_factory.mktemp(f"planted{number}")
        csrc = shutil.copytree(CSRC, folder / "csrc")
        text = (csrc / name).read_text()
        assert text.count(good) == 1, f"{name} no longer says {good!r} once"
        (csrc / name).write_text(text.replace(good, bad))
        return build(folder / "program", flavour, csrc)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build_one, range(len(PLANTED))))


@pytest.mark.parametrize("number", range(len(PLANTED)))
def test_a_planted_bug_is_noticed(planted, number):
    require_sanitizer(planted[number])
    torch.manual_seed(0)
    query = torch.randint(-2, 3, (1, 64, 192)).bfloat16()
    keys = torch.randint(-1, 2, (1, 300, 192)).bfloat16()
    order = exact_logits(query, keys).sort(dim=-1, descending=True, stable=True).indices[..., :9] - 1
    emulator = Emulator(planted[number])
    emulator.device = one_block_device(query, 9)
    with pytest.raises((AssertionError, RuntimeError), match=NOTICED):
        scores, indices = emulator.retrieve(query, keys, 9, None)
        assert_exact(query, keys, 9, scores, indices)
        assert torch.equal(indices.long(), order), "not in order"
    emulator.close()
