"""Packages, and ``dmv_fast._C``: one abi3 module on LibTorch's stable ABI, CUDA included where nvcc is.

A part that cannot be built is left out and one line says why; ``dmv-fast doctor`` repeats it later.

    DMV_FAST_FORCE_EXT=1     a part that cannot be built is an error
    DMV_FAST_SKIP_EXT=1      leave the module out (``cuda``: its CUDA part alone)
    TORCH_CUDA_ARCH_LIST, MAX_JOBS, CUDA_HOME, CXX as everywhere
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# ninja lies beside the interpreter also where its environment is not activated.
os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath)
try:
    from torch.utils import cpp_extension
    from torch.version import __version__ as torch_version
except ImportError:
    cpp_extension = torch_version = None

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # runs on torch 2.11 and later
# Two with PTX: 12.0 for cards to come, 8.6 for those left out here (Jetson) or unknown to an older nvcc (CUDA
# 12.0 to 12.7 end with 9.0a, which runs on nothing else).
CUDA_ARCHS = "8.0 8.6+PTX 8.9 9.0a 10.0 12.0+PTX"
LEAST_ARCH = 80  # cp.async, mma of bfloat16, redux
JOB_BYTES = 2 << 30  # what one compiler process of this project may take
# Shims that only a CUDA LibTorch defines: weak references let the module load beside a CPU-only one.
CUDA_SHIMS = ("aoti_torch_*cuda*", "torch_*cuda*")

sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
cuda_sources = sorted(str(path) for path in Path("csrc").glob("*.cu"))
headers = sorted(str(path) for path in Path("csrc").glob("*") if path.suffix in {".h", ".hpp", ".cuh"})


class NotBuildable(Exception):
    """Why a part of the extension cannot be built here, in one line."""


class Unwanted(NotBuildable):
    """Why a part is not even tried: that is never an error."""


def notice(line: str) -> None:
    """Shows one line to whoever installs: to the terminal too, as pip swallows a build's output."""
    print(line, file=sys.stderr, flush=True)
    try:
        if not sys.stderr.isatty():
            with open("/dev/tty", "w") as terminal:
                terminal.write(f"\n{line}\n")
    except OSError:
        pass


def jobs() -> int:
    """Compiler processes at a time: one a core, and no more than the free memory holds."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    free = []
    try:
        free.append(int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) << 10)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free += [int(limit) - used] if limit.isdigit() else []
    except (OSError, TypeError, ValueError):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(bytes_free // JOB_BYTES for bytes_free in free)]))


def require_cpp() -> None:
    """Raises NotBuildable where the C++ part has no chance; a compiler may still find more."""
    if not sources:
        raise NotBuildable("there are no sources in csrc/")
    if cpp_extension is None:
        raise NotBuildable("the build cannot import torch (with --no-build-isolation, install torch first)")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise NotBuildable("a free-threaded Python has no stable ABI")
    compiler = shlex.split(os.environ.get("CXX", "cl" if os.name == "nt" else "c++"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise NotBuildable(f"no C++ compiler ({' '.join(compiler)}) is on the PATH")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        raise NotBuildable("Python.h is missing (Debian and Ubuntu: the python3-dev package)")


def find_nvcc() -> str:
    """The nvcc of CUDA_HOME or CUDA_PATH, else of the PATH, else of /usr/local/cuda."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(os.path.join(home, "bin") for home in homes), None, "/usr/local/cuda/bin"]
    for nvcc in (shutil.which("nvcc", path=place) for place in places):
        if nvcc:
            return nvcc
    raise NotBuildable("no nvcc in CUDA_HOME, on the PATH or in /usr/local/cuda")


def arch_flags(nvcc: str) -> list[str]:
    """The -gencode flags of TORCH_CUDA_ARCH_LIST, or else of what this nvcc knows of CUDA_ARCHS."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    known = set(re.findall(r"compute_(\d+)", output_of([nvcc, "--list-gpu-arch"])))
    flags = []
    for arch in re.split(r"[;,\s]+", asked or CUDA_ARCHS):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        number = match and match[1] + match[2]
        if number and int(number) < LEAST_ARCH:
            continue  # lists made for all of torch go further down than the kernels do
        if number in known:
            name = number + match[3]
            codes = f"sm_{name}" + (f",compute_{name}" if match[4] else "")
            flags += ["-gencode", f"arch=compute_{name},code=[{codes}]"]
        elif asked:
            raise NotBuildable(f"nvcc knows no {arch!r} of TORCH_CUDA_ARCH_LIST={asked!r}")
    if not flags:
        raise NotBuildable(f"of the architectures {asked or CUDA_ARCHS} {nvcc} knows none from 8.0 on")
    return flags


def output_of(command: list[str]) -> str:
    """stdout and stderr of a command that has to succeed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode:
        print(shlex.join(command), done.stdout, sep="\n", flush=True)
        errors = [line.strip() for line in done.stdout.splitlines() if re.search(r"error|fatal", line, re.I)]
        raise NotBuildable(f"{Path(command[0]).name}: {(errors or ['failed'])[0]}")
    return done.stdout


def compile_cuda(folder: Path) -> dict[str, list[str]]:
    """Compiles csrc/*.cu by nvcc itself: torch's own CUDAExtension refuses wherever torch is a CPU build.

    Returns what linking them needs, as attributes of an Extension.
    """
    if os.name == "nt":
        raise NotBuildable("the CUDA sources are built on Linux only")
    nvcc = find_nvcc()
    workers = jobs()
    command = [nvcc, "-c", "-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    command += ["-DUSE_CUDA", TORCH_TARGET, *(f"-I{path}" for path in cpp_extension.include_paths())]
    command += arch_flags(nvcc)
    if os.environ.get("CXX"):
        command += ["-ccbin", os.environ["CXX"]]
    threads = str(max(1, workers // len(cuda_sources)))  # of nvcc, over the architectures of one source
    weaken = [f"--weaken-symbol={shim}" for shim in CUDA_SHIMS]
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: str) -> str:
        target, made_by = folder / f"{Path(source).stem}.cu.o", folder / f"{Path(source).stem}.cu.cmd"
        line = shlex.join([*command, source, "-o", str(target)])
        newest = max(os.path.getmtime(path) for path in [source, *headers])
        if not made_by.exists() or made_by.read_text() != line or target.stat().st_mtime < newest:
            made_by.unlink(missing_ok=True)
            print(line, output_of([*shlex.split(line), "--threads", threads]), sep="\n", flush=True)
            output_of(["objcopy", "--wildcard", *weaken, str(target)])
            made_by.write_text(line)
        return str(target)

    with ThreadPoolExecutor(workers) as pool:
        objects = list(pool.map(compile_one, cuda_sources))
    libraries = re.search(r"LIBRARIES=(.*)", output_of([nvcc, "--dryrun", "-x", "cu", os.devnull]))
    return {
        "extra_objects": objects,
        "depends": objects,  # without ninja a module newer than these is not linked again
        "library_dirs": [path[2:] for path in shlex.split(libraries[1] if libraries else "")],
        "libraries": ["cudart_static", "rt", "dl", "pthread"],
        # The runtime library inside the module stays its own, whichever one torch has loaded. libtorch.so is
        # but a list of libraries, with the CUDA one where torch has it. The linker would leave it out
        # (--as-needed is GCC's default on Debian and Ubuntu): the weak references would then be null.
        "extra_link_args": [
            "-Wl,--exclude-libs,ALL",
            "-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state",
        ],
    }  # fmt: skip


class BuildPy(build_py):
    """Starts from an empty build folder, so that a wheel never carries files deleted since the last build."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "dmv_fast", ignore_errors=True)
        super().run()


class BuildExt(cpp_extension.BuildExtension if cpp_extension else build_ext):
    """Builds the module whole, or without its CUDA part, or not at all, and records which."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable build would use a folder in /tmp, and the next one would compile everything again.
        self.build_temp = f"build/temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

    def run(self) -> None:
        self.record = {"torch": torch_version or "none"}
        in_place = bool(self.inplace)
        try:
            if os.environ.get("DMV_FAST_SKIP_EXT", "") not in ("", "0", "cuda"):
                raise Unwanted("DMV_FAST_SKIP_EXT asks for that")
            require_cpp()
            os.environ["MAX_JOBS"] = str(jobs())
            super().run()
        except Exception as error:  # whatever goes wrong in compiling, the rest of the package still installs
            self.leave_out("cpu", error)
            self.extensions = self.distribution.ext_modules = []
            self.get_finalized_command("bdist_wheel").root_is_pure = True
            if in_place:
                for stale in Path("dmv_fast").glob("_C.*"):
                    stale.unlink()
        folder = Path("dmv_fast") if in_place else Path(self.build_lib) / "dmv_fast"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps(self.record, indent=1) + "\n")

    def build_extension(self, ext: Extension) -> None:
        try:
            if not cuda_sources:
                raise Unwanted("csrc/ has no CUDA sources")
            if os.environ.get("DMV_FAST_SKIP_EXT") == "cuda":
                raise Unwanted("DMV_FAST_SKIP_EXT asks for that")
            whole = copy.copy(ext)
            for name, values in compile_cuda(Path(self.build_temp) / "cuda").items():
                setattr(whole, name, [*getattr(ext, name), *values])
            self.build_and_load(whole)
            self.record["cuda"] = "built"
        except Exception as error:
            self.build_and_load(ext)  # where this fails too, it was not the CUDA part
            self.leave_out("cuda", error)
        self.record["cpu"] = "built"

    def build_and_load(self, ext: Extension) -> None:
        """Builds; a module that does not load (an undefined symbol, say) counts as one that was not built."""
        super().build_extension(ext)
        ctypes.CDLL(os.path.abspath(self.get_ext_fullpath(ext.name)))

    def leave_out(self, part: str, error: Exception) -> None:
        """Records and shows why a part is missing; an error under DMV_FAST_FORCE_EXT."""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not isinstance(error, NotBuildable):
            reason = f"{reason} (pip -v shows the compiler's output)"
        self.record[part] = f"not built: {reason}"
        name = {"cpu": "C++ extension", "cuda": "CUDA part"}[part]
        forced = os.environ.get("DMV_FAST_FORCE_EXT", "") not in ("", "0")
        if forced and not isinstance(error, Unwanted):
            raise SystemExit(f"dmv_fast: DMV_FAST_FORCE_EXT is set, but the {name} cannot be built: {reason}")
        if part == "cpu" or cuda_sources:
            notice(f"dmv_fast: installing without the {name}: {reason}")


def extension() -> Extension:
    """dmv_fast._C, which BuildExt leaves out where it cannot be made."""
    flags = ["-O3", "-g0", "-fvisibility=hidden", TORCH_TARGET]
    flags += ["-Wno-maybe-uninitialized"]  # GCC 12 finds thousands in its own AVX-512 intrinsics
    if os.name == "nt":
        flags = ["/O2", TORCH_TARGET]
    make = cpp_extension.CppExtension if cpp_extension else Extension
    return make("dmv_fast._C", sources, depends=headers, extra_compile_args=flags, py_limited_api=True)


setup(
    packages=[*find_packages(include=["dmv_fast", "dmv_fast.*"]), "dmv_fast.kernels"],
    package_dir={"dmv_fast.kernels": "kernels"},
    ext_modules=[extension()],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
