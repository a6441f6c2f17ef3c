"""What is installed: the wheel, its extension, installs without a compiler, and what `doctor` says of it."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import setuptools
import torch

from dmv_fast import doctor, ops
from dmv_fast.model.dmv import DMV, DMVConfig
from dmv_fast.weights import save_model

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("reference", "cpu", "triton", "cuda")
pytestmark = pytest.mark.skipif(os.name == "nt", reason="written for a POSIX shell and its paths")


def pip_wheel(
    into: Path, prefix: Sequence[str] = (), stdin: int = subprocess.DEVNULL, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Builds the wheel against the installed torch, in a session of its own: no terminal to write to."""
    command = [*prefix, sys.executable, "-m", "pip", "wheel", str(ROOT), "-w", str(into)]
    return subprocess.run(
        [*command, "--no-deps", "--no-build-isolation", "--no-index"],
        env=os.environ | environment, stdin=stdin, capture_output=True, text=True, start_new_session=True,
    )  # fmt: skip


def no_compiler() -> dict[str, str]:
    """An environment in which every compiler fails at once."""
    false = shutil.which("false")
    assert false, "no `false` command here"
    return {"CC": false, "CXX": false, "DMV_FAST_SKIP_EXT": "", "DMV_FAST_FORCE_EXT": ""}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = pip_wheel(folder)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def second_venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it; it sees this one's packages, as torch is too big to install."""
    folder = tmp_path_factory.mktemp("second") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    outer = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "outer.pth").write_text("".join(f"{path}\n" for path in outer))
    install = ["-m", "pip", "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    subprocess.run([str(folder / "bin" / "python"), *install], check=True, capture_output=True)
    return folder


def run_in(folder: Path, cwd: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    whole = [str(folder / "bin" / command[0]), *command[1:]]
    done = subprocess.run(whole, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packaged = {name for name in names if ".dist-info/" not in name}
    package = ROOT / "dmv_fast"
    expected = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    expected |= {f"dmv_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    data = [path for end in ("safetensors", "md", "json") for path in (package / "weights").glob(f"*.{end}")]
    expected |= {f"dmv_fast/weights/{path.name}" for path in data}
    expected |= {f"dmv_fast/report/page.{end}" for end in ("css", "js")}
    expected |= {"dmv_fast/py.typed", "dmv_fast/_build.json"}
    assert packaged - {"dmv_fast/_C.abi3.so", "dmv_fast/weights/SHA256SUMS"} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_tag_tells_what_is_inside(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    record = json.loads(archive.read("dmv_fast/_build.json"))
    compiled = record["cpu"] == "built"
    assert ("dmv_fast/_C.abi3.so" in archive.namelist()) == compiled
    assert ("cp310-abi3-" in wheel.name) == compiled
    assert wheel.name.endswith("-py3-none-any.whl") != compiled


def test_here_the_extension_is_built_wherever_its_compilers_are(wheel: Path) -> None:
    """Without this, a broken source would only ever show as a slower backend."""
    if os.environ.get("DMV_FAST_SKIP_EXT") or not list((ROOT / "csrc").glob("*.cpp")):
        pytest.skip("no extension is asked for")
    record = json.loads(zipfile.ZipFile(wheel).read("dmv_fast/_build.json"))
    assert record["cpu"] == "built" or "compiler" in record["cpu"] or "Python.h" in record["cpu"]
    if record["cpu"] == "built" and shutil.which("nvcc") and list((ROOT / "csrc").glob("*.cu")):
        assert record["cuda"] == "built"


def test_the_cuda_part_brings_torch_s_cuda_library_with_it(wheel: Path, tmp_path: Path) -> None:
    """Its references to that library are weak: without libtorch.so among what it needs they would be null."""
    archive = zipfile.ZipFile(wheel)
    record = json.loads(archive.read("dmv_fast/_build.json"))
    if record.get("cuda") != "built" or not shutil.which("readelf"):
        pytest.skip("there is no CUDA part, or no readelf")
    module = archive.extract("dmv_fast/_C.abi3.so", tmp_path)
    said = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
    assert "[libtorch.so]" in said


def test_wheel_works_in_a_second_environment(second_venv: Path, tmp_path: Path) -> None:
    """Imports, a retrieval and a tracked frame, all from the installed wheel and outside the checkout."""
    torch.manual_seed(0)
    save_model(DMV(DMVConfig()), tmp_path / "random.safetensors")
    np.save(tmp_path / "frame.npy", np.random.default_rng(0).integers(0, 255, (120, 160, 3), np.uint8))
    script = tmp_path / "script.py"
    script.write_text(
        "import json, numpy as np, torch, dmv_fast, dmv_fast.kernels\n"
        "from dmv_fast import FastDMVTracker, ops\n"
        "query, keys = torch.eye(4)[None] * 3, torch.eye(8, 4)[None] * 2\n"
        "scores, indices = ops.retrieve(query, keys, 2)\n"
        "frame = np.load('frame.npy')\n"
        "tracker = FastDMVTracker('random.safetensors', device='cpu')\n"
        "tracker.init(frame, (40, 30, 50, 40))\n"
        "ok, box = tracker.update(frame)\n"
        "files = [dmv_fast.__file__, dmv_fast.kernels.__file__]\n"
        "print(json.dumps([files, indices[0, :, 0].tolist(), scores[0, 0].tolist(), list(map(int, box))]))\n"
    )
    said = run_in(second_venv, tmp_path, "python", str(script))
    files, best, scores, box = json.loads(said.splitlines()[-1])
    assert all(Path(file).is_relative_to(second_venv) for file in files)
    assert best == [0, 1, 2, 3]
    e6 = float(np.exp(6.0))
    assert scores == pytest.approx([e6 / (e6 + 8), 1 / (e6 + 8)], rel=1e-5)
    assert box[2] > 0 and box[3] > 0


def test_console_script_of_the_wheel(second_venv: Path, tmp_path: Path) -> None:
    said = run_in(second_venv, tmp_path, "dmv-fast", "doctor")
    assert str(second_venv) in said
    assert "failed:" not in said


def test_without_a_compiler_it_installs_and_says_so_on_the_terminal(tmp_path: Path) -> None:
    import pty

    terminal, theirs = pty.openpty()
    take_terminal = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    take_terminal += "; os.execv(sys.argv[1], sys.argv[1:])"
    built = pip_wheel(tmp_path, [sys.executable, "-c", take_terminal], stdin=theirs, **no_compiler())
    os.close(theirs)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = tmp_path.glob("*-py3-none-any.whl")
    lines = [line for line in shown.splitlines() if line.startswith("dmv_fast: ")]
    assert len(lines) == 1 and "installing without the C++ extension" in lines[0]
    record = json.loads(zipfile.ZipFile(path).read("dmv_fast/_build.json"))
    assert record["cpu"].startswith("not built: ")
    assert record["cpu"].removeprefix("not built: ") in lines[0]


def test_force_ext_makes_a_missing_compiler_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", str(tmp_path)]
    environment = os.environ | no_compiler() | {"DMV_FAST_FORCE_EXT": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode != 0
    assert "DMV_FAST_FORCE_EXT is set, but the C++ extension cannot be built" in built.stderr
    assert not list(tmp_path.iterdir())


def test_kernels_import_from_the_checkout_and_from_elsewhere(tmp_path: Path) -> None:
    """An editable install has to serve both: the checkout's own dmv_fast/ has no kernels/ in it."""
    installed = [found.read_text("direct_url.json") for found in metadata.distributions(name="dmv-fast")]
    if not any(json.loads(origin or "{}").get("dir_info", {}).get("editable") for origin in installed):
        pytest.skip("dmv_fast is not installed editable")
    for folder in (ROOT, tmp_path):
        command = [sys.executable, "-c", "import dmv_fast.kernels as kernels; print(kernels.__file__)"]
        said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
        assert Path(said.strip()) == ROOT / "kernels" / "__init__.py"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The functions of setup.py, without its setup()."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")


@pytest.fixture
def nvcc(tmp_path: Path) -> str:
    """An nvcc that knows sm_80, sm_90 and sm_120."""
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho compute_80; echo compute_90; echo compute_120\n")
    script.chmod(0o755)
    return str(script)


def test_architectures_are_those_that_nvcc_knows(build: dict, nvcc: str) -> None:
    flags = build["arch_flags"](nvcc)[1::2]
    assert flags == [
        "arch=compute_80,code=[sm_80]",
        "arch=compute_90a,code=[sm_90a]",
        "arch=compute_120,code=[sm_120,compute_120]",
    ]


def test_torch_cuda_arch_list_is_honoured(build: dict, nvcc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a;8.0+PTX")
    flags = build["arch_flags"](nvcc)[1::2]
    assert flags == ["arch=compute_90a,code=[sm_90a]", "arch=compute_80,code=[sm_80,compute_80]"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 13.5")
    with pytest.raises(build["NotBuildable"], match=r"13\.5"):
        build["arch_flags"](nvcc)


def test_architectures_that_the_kernels_are_not_for_are_left_out(build: dict, nvcc: str, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0;9.0a+PTX")
    flags = build["arch_flags"](nvcc)[1::2]
    assert flags == ["arch=compute_80,code=[sm_80]", "arch=compute_90a,code=[sm_90a,compute_90a]"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    with pytest.raises(build["NotBuildable"]):
        build["arch_flags"](nvcc)


def test_nvcc_of_cuda_home_comes_first(build: dict, nvcc: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(Path(nvcc).parent.parent))
    assert build["find_nvcc"]() == nvcc


def test_jobs_follow_max_jobs_or_else_the_cores(build: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert 1 <= build["jobs"]() <= os.cpu_count()
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build["jobs"]() == 7


def test_jobs_fit_into_the_free_memory(build: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that runs out of memory ends an install with no word of why."""
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    read = Path.read_text
    room = build["JOB_BYTES"] >> 10
    for free, expected in ((room // 2, 1), (3 * room + 1, 3)):
        monkeypatch.setattr(
            Path, "read_text",
            lambda path, free=free: f"MemAvailable: {free} kB" if path.name == "meminfo" else read(path),
        )  # fmt: skip
        assert build["jobs"]() == expected


def test_doctor_names_every_backend_and_why_one_is_missing() -> None:
    lines = doctor.report().splitlines()
    for device in ("cpu", "cuda"):
        start = next(i for i, line in enumerate(lines) if line.startswith(f"backends on {device} "))
        facts = dict(line[18:].split(": ", 1) for line in lines[start : start + len(BACKENDS)])
        assert set(facts) == set(BACKENDS)
        for name, why in ops.available_backends(device).items():
            assert facts[name] == (why or "usable")


def test_doctor_says_which_instructions_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.available_backends("cpu")["cpu"] is not None:
        pytest.skip("the C++ extension is not built")
    usable = torch.ops.dmv_fast.cpu_isas().split()
    monkeypatch.delenv("DMV_FAST_CPU_ISA", raising=False)
    assert f"CPU kernels use {usable[0]}\n" in doctor.report()
    monkeypatch.setenv("DMV_FAST_CPU_ISA", usable[-1])
    assert f"use {usable[-1]}, as DMV_FAST_CPU_ISA asks (without it {usable[0]})\n" in doctor.report()


def test_doctor_reports_a_broken_part_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device_type: str) -> dict[str, str | None]:
        raise RuntimeError("driver\nis gone")

    monkeypatch.setattr(ops, "available_backends", broken)
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setitem(sys.modules, "cv2", None)
    said = doctor.report()
    assert said.count("failed: RuntimeError: driver is gone") >= 2
    assert "cv2 does not import" in said
    assert "\nweights " in said
