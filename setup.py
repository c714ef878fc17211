"""Builds depthnet._C from csrc/; the metadata is in pyproject.toml.

The extension takes raw pointers and links no libtorch, so it builds in a minute on two cores and
works with any torch.  Each file named in PER_ISA is compiled once per instruction set; the choice
between the copies is made at import, by CPUID.  CXX and CXXFLAGS are honoured, the latter with the
last word; DEPTHNET_NATIVE=0 leaves the extension out.
"""

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

PER_ISA = [
    "csrc/cpu/residual.cpp",
    "csrc/cpu/stack.cpp",
    "csrc/cpu/optimizer.cpp",
    "csrc/cpu/peak.cpp",
]
ISAS = {"baseline": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    ISAS["avx512"] += ["-mprefer-vector-width=512"]
    ISAS["avx512_bf16"] = [*ISAS["avx512"], "-mavx512bf16", "-DDEPTHNET_ISA_AVX512=1"]


class BuildNative(build_ext):
    def run(self):
        if os.environ.get("DEPTHNET_NATIVE") == "0":
            return self.leave_out("DEPTHNET_NATIVE=0 is set")
        compiler = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
        if not any(shutil.which(name) for name in compiler):
            return self.leave_out(f"no C++ compiler was found (looked for {', '.join(compiler)})")
        return super().run()

    def leave_out(self, reason):
        self.extensions = []
        message = (
            f"depthnet: the native CPU kernels (depthnet._C) were left out, because {reason}. "
            "Everything runs on the reference backend instead: the same results, several times "
            "slower on a CPU. Install a C++17 compiler and run the install again to have them."
        )
        print(message, file=sys.stderr)
        # `depthnet doctor` repeats this line: pip hides what a build prints.
        target = ROOT / "depthnet" if self.editable_mode else Path(self.build_lib) / "depthnet"
        target.mkdir(parents=True, exist_ok=True)
        for stale in target.glob("_C.*"):  # of an earlier build in the same folder
            stale.unlink()
        (target / "_C_left_out.txt").write_text(message + "\n")

    def build_extension(self, ext):
        # pybind11 is a build requirement only: imported where it is needed.
        import pybind11

        include_dirs = [str(ROOT / "csrc"), pybind11.get_include(), *self.compiler.include_dirs]
        common = ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
        # Vectors never cross a translation unit, so their ABI does not matter; GCC 12 warns of
        # uninitialised variables inside its own AVX-512 headers (its bug 105593).
        common += ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
        macros = [(f"DEPTHNET_HAVE_{name.upper()}", "1") for name in ISAS]

        last_word = os.environ.get("CXXFLAGS", "").split()

        def compile_one(source, folder, flags, more_macros):
            (built,) = self.compiler.compile(
                [source],
                output_dir=os.path.join(self.build_temp, folder),
                macros=[*macros, *more_macros],
                include_dirs=include_dirs,
                extra_postargs=[*common, *flags, *last_word],
                depends=ext.depends,
            )
            return built

        compilations = []
        for name, flags in ISAS.items():
            isa = [("DEPTHNET_ISA", name), (f"DEPTHNET_ISA_{name.upper()}", "1")]
            compilations += [(source, name, flags, isa) for source in PER_ISA]
        plain = [source for source in ext.sources if source not in PER_ISA]
        compilations += [(source, "plain", [], []) for source in plain]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, *zip(*compilations, strict=True)))
        output = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, output, libraries=["dl"], target_lang="c++")
        for folder in (Path(output).parent, ROOT / "depthnet"):
            (folder / "_C_left_out.txt").unlink(missing_ok=True)


native = Extension(
    "depthnet._C",
    sources=sorted(
        str(path.relative_to(ROOT)).replace(os.sep, "/") for path in ROOT.glob("csrc/**/*.cpp")
    ),
    depends=sorted(str(path) for path in ROOT.glob("csrc/**/*.h")),
)

setup(
    packages=[
        "depthnet",
        *(f"depthnet.{path.parent.name}" for path in sorted(ROOT.glob("depthnet/*/__init__.py"))),
        "depthnet.kernels",
        "depthnet.csrc",
    ],
    package_dir={"depthnet": "depthnet", "depthnet.kernels": "kernels", "depthnet.csrc": "csrc"},
    package_data={
        "depthnet": ["py.typed"],
        "depthnet.csrc": ["*.cpp", "*/*.cpp", "*/*.h"],
    },
    ext_modules=[native],
    cmdclass={"build_ext": BuildNative},
)
