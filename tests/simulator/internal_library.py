"""Asks the wheel's own library of internal kernels, and the simulator's, what they take.

The wheel's library runs its checks without a card; only its kernels need one. What it links beyond the simulator's
functions are functions of CANN that do nothing here.
"""

import os
import pathlib
import re
import subprocess

from simulator.environment import BUILD, environment

SOURCE = pathlib.Path(__file__).with_name("ask_internal.cc")
SIMULATED = BUILD / "cann" / "lib64" / "libms_kernels_internal.so"
REAL = """
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
int memcpy_s(void *to, size_t room, const void *from, size_t size) { memcpy(to, from, size); return 0; }
int memset_s(void *to, size_t room, int value, size_t size) { memset(to, value, size); return 0; }
int strcpy_s(char *to, size_t room, const char *from) { strcpy(to, from); return 0; }
int vsnprintf_s(char *to, size_t room, size_t most, const char *form, va_list all) { return vsnprintf(to, room, form, all); }
int snprintf_s(char *to, size_t room, size_t most, const char *form, ...) {
  va_list all;
  va_start(all, form);
  int size = vsnprintf(to, room, form, all);
  va_end(all);
  return size;
}
int rtGetSocVersion(char *name, unsigned room) { strcpy(name, "Ascend910B2"); return 0; }
"""


class Library:
    """One of the two libraries, asked in processes of their own."""

    def __init__(self, program, variables):
        self.program, self.variables = program, variables

    def ask(self, questions, **more):
        """True or False for each line of `questions` (the forms in ask_internal.cc)."""
        return [taken for taken, _ in self.answers(questions, **more)]

    def workspaces(self, questions):
        """Bytes of workspace for each line of `questions`."""
        return [workspace for _, workspace in self.answers(questions)]

    def answers(self, questions, **more):
        result = subprocess.run([self.program], input="\n".join([*questions, "end"]) + "\n", capture_output=True,
                                text=True, env={**os.environ, **self.variables, **more}, timeout=120)
        answers = [(yes == "1", int(size)) for yes, size in re.findall(r"answer ([01]) (\d+)", result.stdout)]
        assert len(answers) == len(questions), (result.returncode, result.stdout[-2000:], result.stderr[-2000:])
        return answers


def libraries(folder):
    """(the wheel's, the simulator's) as `Library`, after what they need is built in `folder`."""
    import importlib.util

    wheel = pathlib.Path(importlib.util.find_spec("mindspore").submodule_search_locations[0])
    kernels = wheel / "lib" / "plugin" / "ascend" / "ms_kernels_internal"
    headers, real = kernels / "internal_kernel", kernels / "internal_kernel" / "lib" / "libms_kernels_internal.so"
    program = folder / "ask"
    subprocess.run(["g++", "-std=c++17", "-O0", "-D_GLIBCXX_USE_CXX11_ABI=0", f"-I{headers}", f"-I{headers}/include",
                    str(SOURCE), "-o", str(program), str(SIMULATED), "-Wl,--allow-shlib-undefined"], check=True)
    needed = [real, *(kernels / "asdops" / "lib" / f"lib{name}_ms.so" for name in ("asdops", "atb_mixops", "mki",
                                                                                  "tbe_adapter"))]
    cann = folder / "cann" / "lib64"
    cann.mkdir(parents=True)
    _stand_in(needed, cann)
    search = f"{cann}:{kernels}/asdops/lib:{real.parent}"
    preloaded = {"LD_LIBRARY_PATH": search, "LD_PRELOAD": f"{cann}/libascendcl.so", "ASCEND_HOME_PATH": str(cann.parent)}
    simulated = {name: value for name, value in environment(base={}).items() if name != "PYTHONPATH"}
    return Library(program, preloaded), Library(program, simulated)


def _symbols(option, files):
    lines = subprocess.run(["nm", "-D", option, *map(str, files)], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in lines.splitlines() if line.strip() and not line.endswith(":")
            and " w " not in line}


def _stand_in(libraries, folder):
    """CANN's libraries as far as those in `libraries` need them, in `folder`: functions that give 0."""
    system = subprocess.run(["ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
    known = re.findall(r"=> (\S*/(?:libc|libm|libstdc\+\+|libgcc_s|libdl|libpthread|ld-linux-x86-64)\.so\S*)", system)
    known = [path for path in known if "x86_64" in path or "/lib64/" in path]
    given = set(re.findall(r"^int (\w+)\(", REAL, re.MULTILINE))
    missing = _symbols("--undefined-only", libraries) - _symbols("--defined-only", libraries + known) - given
    lines = []
    for name in sorted(missing):
        if name.startswith(("_ZTV", "_ZTI")):
            lines.append(f".data\n.globl {name}\n{name}: .zero 512")
        else:
            lines.append(f".text\n.globl {name}\n.type {name},@function\n{name}: xor %eax,%eax\nret")
    (folder / "missing.s").write_text("\n".join(lines) + "\n.section .note.GNU-stack\n")
    (folder / "real.c").write_text(REAL)
    needed = {name for path in libraries for name in re.findall(r"\[(lib\w+\.so)\]", subprocess.run(
        ["readelf", "-d", str(path)], check=True, capture_output=True, text=True).stdout)}
    for name in needed - {path.name for path in libraries} | {"libascendcl.so", "libruntime.so"}:
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name),
                        *([str(folder / "missing.s"), str(folder / "real.c")] if name in ("libascendcl.so", "libruntime.so")
                          else ["-xc", "/dev/null"])], check=True)
