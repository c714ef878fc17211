"""Builds depthnet._C and depthnet._C_cuda from csrc/; the metadata is in pyproject.toml.

The extensions take raw pointers and link no libtorch, so they build in two minutes on two cores and
work with any torch.  Each file named in PER_ISA is compiled once per instruction set, but for
avx512_bf16 only the file with products of bfloat16; the choice between the copies is made at import,
by CPUID.  CXX and CXXFLAGS are honoured, the latter with the last word; DEPTHNET_NATIVE=0 leaves the
extensions out.

_C_cuda is built where nvcc is found, in CUDA_HOME, on PATH or in /usr/local/cuda, for the architectures
in TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"); it needs no GPU and no torch with CUDA.  DEPTHNET_CUDA=0
leaves it out.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

PER_ISA = [
    "csrc/cpu/stack.cpp",  # first: it compiles the longest
    "csrc/cpu/residual.cpp",
    "csrc/cpu/residual_norm.cpp",
    "csrc/cpu/transformer.cpp",
    "csrc/cpu/linear.cpp",
    "csrc/cpu/optimizer.cpp",
    "csrc/cpu/peak.cpp",
]
ISAS = {"baseline": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    ISAS["avx512"] += ["-mprefer-vector-width=512"]
    ISAS["avx512_bf16"] = [*ISAS["avx512"], "-mavx512bf16", "-DDEPTHNET_ISA_AVX512=1"]


# Each operation of an optimizer is rounded, whichever products a compiler would like to fuse with sums:
# results are then the same bits wherever an element lies, and on every instruction set.
OWN_FLAGS = {"csrc/cpu/optimizer.cpp": ["-ffp-contract=off"]}

CUDA_ARCHITECTURES = ["8.0", "9.0", "10.0"]  # where TORCH_CUDA_ARCH_LIST is not set


def find_nvcc():
    """The path of nvcc, or None."""
    homes = [os.environ.get("CUDA_HOME"), None, "/usr/local/cuda"]  # None: PATH
    found = (shutil.which("nvcc", path=home and os.path.join(home, "bin")) for home in homes)
    return next(filter(None, found), None)


def cuda_architectures(nvcc):
    """What to compile for, in the format of TORCH_CUDA_ARCH_LIST: ["8.0", "9.0+PTX"]."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if wanted:
        return wanted
    known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True).split()
    default = [arch for arch in CUDA_ARCHITECTURES if "compute_" + arch.replace(".", "") in known]
    return [*default[:-1], *(f"{last}+PTX" for last in default[-1:])]


def gencode(architecture):
    """nvcc's flag for one entry of TORCH_CUDA_ARCH_LIST."""
    number, _, ptx = architecture.replace(".", "").partition("+")
    return f"-gencode=arch=compute_{number},code=[sm_{number}{f',compute_{number}' if ptx else ''}]"


def own_name(ext):
    return ext.name.rpartition(".")[2]


class BuildNative(build_ext):
    def finalize_options(self):
        super().finalize_options()
        self.parallel = True  # nvcc runs beside the C++ compiler

    def run(self):
        compiler = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
        missing = None
        if os.environ.get("DEPTHNET_NATIVE") == "0":
            missing = "DEPTHNET_NATIVE=0 is set"
        elif not any(shutil.which(name) for name in compiler):
            missing = f"no C++ compiler was found (looked for {', '.join(compiler)})"
        if missing:
            self.leave_out(native, missing)
        if os.environ.get("DEPTHNET_CUDA") == "0":
            missing = "DEPTHNET_CUDA=0 is set"
        elif not find_nvcc():
            missing = missing or "nvcc was not found"
        if missing:
            self.leave_out(cuda, missing)
        super().run()

    def leave_out(self, ext, reason):
        self.extensions = [other for other in self.extensions if other is not ext]
        message = LEFT_OUT[ext.name].format(reason=reason)
        print(message, file=sys.stderr)
        # `depthnet doctor` repeats this line: pip hides what a build prints.
        target = ROOT / "depthnet" if self.editable_mode else Path(self.build_lib) / "depthnet"
        target.mkdir(parents=True, exist_ok=True)
        for stale in target.glob(f"{own_name(ext)}.*"):  # of an earlier build in the same folder
            stale.unlink()
        (target / f"{own_name(ext)}_left_out.txt").write_text(message + "\n")

    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name))
        try:
            build = self.build_native if ext is native else self.build_cuda
            build(output)
        except (CompileError, OSError, subprocess.CalledProcessError) as error:
            if ext is native:
                raise
            said = getattr(error, "stdout", None) or str(error)
            self.leave_out(ext, f"their build failed: {said.strip()}")
        else:
            for folder in (output.parent, ROOT / "depthnet"):
                (folder / f"{own_name(ext)}_left_out.txt").unlink(missing_ok=True)

    def compile_one(self, source, folder, flags, macros):
        # pybind11 is a build requirement only: imported where it is needed.
        import pybind11

        # Python's own flags often have -g, and describing every template takes longer than the rest.
        common = ["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
        # Vectors never cross a translation unit, so their ABI does not matter; GCC 12 warns of
        # uninitialised variables inside its own AVX-512 headers (its bug 105593).
        common += [
            "-Wno-psabi",
            "-Wno-uninitialized",
            "-Wno-maybe-uninitialized",
            "-Wno-unknown-warning-option",
        ]
        last_word = os.environ.get("CXXFLAGS", "").split()
        (built,) = self.compiler.compile(
            [source],
            output_dir=os.path.join(self.build_temp, folder),
            macros=macros,
            include_dirs=[
                str(ROOT / "csrc"),
                pybind11.get_include(),
                *self.compiler.include_dirs,
            ],
            extra_postargs=[*common, *flags, *OWN_FLAGS.get(source, []), *last_word],
            depends=native.depends,
        )
        return built

    def build_native(self, output):
        macros = [(f"DEPTHNET_HAVE_{name.upper()}", "1") for name in ISAS]
        compilations = []
        for source in PER_ISA:
            for name, flags in reversed(ISAS.items()):
                if name == "avx512_bf16" and source != "csrc/cpu/stack.cpp":
                    continue  # the other kernels have no product of bfloat16: AVX-512's serve
                isa = [("DEPTHNET_ISA", name), (f"DEPTHNET_ISA_{name.upper()}", "1")]
                compilations.append((source, name, flags, [*macros, *isa]))
        plain = [source for source in native.sources if source not in PER_ISA]
        compilations += [(source, "plain", [], macros) for source in plain]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(self.compile_one, *zip(*compilations, strict=True)))
        self.compiler.link_shared_object(objects, str(output), libraries=["dl"], target_lang="c++")

    def build_cuda(self, output):
        nvcc, folder = find_nvcc(), Path(self.build_temp) / "cuda"

        def run(*arguments):
            subprocess.run(
                [nvcc, *arguments],
                check=True,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )

        architectures = cuda_architectures(nvcc)
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        objects = []
        for source in cuda.sources:
            if source.endswith(".cu"):
                objects.append(str(folder / Path(source).with_suffix(".o").name))
                flags = ["-std=c++17", "-O3", "--threads=0"]
                flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{ROOT / 'csrc'}"]
                flags += map(gencode, architectures)
                run(*flags, "-c", source, "-o", objects[-1])
            else:
                macros = [("DEPTHNET_CUDA_ARCHITECTURES", f'"{";".join(architectures)}"')]
                objects.append(self.compile_one(source, "cuda", [], macros))
        # torch may hold a CUDA runtime of another version: this one's symbols stay inside.
        flags = ["-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL"]
        run(*flags, *objects, "-o", str(output))


def sources(*patterns):
    paths = {path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(path.as_posix() for path in paths)


cuda = Extension("depthnet._C_cuda", sources("csrc/cuda/*.cu", "csrc/cuda/*.cpp"))
native = Extension(
    "depthnet._C",
    sorted({*sources("csrc/**/*.cpp")} - {*cuda.sources}),
    depends=sources("csrc/**/*.h"),
)
LEFT_OUT = {
    native.name: "depthnet: the native CPU kernels (depthnet._C) were left out, because {reason}. "
    "Everything runs on the reference backend instead: the same results, several times slower on a "
    "CPU. Install a C++17 compiler and run the install again to have them.",
    cuda.name: "depthnet: the CUDA kernels (depthnet._C_cuda) were left out, because {reason}. Other "
    "backends run on a GPU instead. Install the CUDA toolkit, with nvcc, and run the install again to "
    "have them.",
}

setup(
    packages=[
        "depthnet",
        *(f"depthnet.{path.parent.name}" for path in sorted(ROOT.glob("depthnet/*/__init__.py"))),
        "depthnet.kernels",
        *(f"depthnet.kernels.{p.parent.name}" for p in sorted(ROOT.glob("kernels/*/__init__.py"))),
        "depthnet.csrc",
    ],
    package_dir={"depthnet": "depthnet", "depthnet.kernels": "kernels", "depthnet.csrc": "csrc"},
    package_data={
        "depthnet": ["py.typed"],
        "depthnet.kernels": ["tiles.json"],
        "depthnet.report": ["*.jinja"],
        "depthnet.csrc": ["*.cpp", "*/*.cpp", "*/*.cu", "*/*.h"],
    },
    ext_modules=[native, cuda],
    cmdclass={"build_ext": BuildNative},
)
