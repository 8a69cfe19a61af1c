"""Writes, as C, a refusing function for every symbol that the wheel links or looks up and the simulator does not define.

Usage: missing.py WHEEL OBJECT… : WHEEL is mindspore's directory in site-packages, an OBJECT a compiled file of ours.
"""

import glob
import re
import subprocess
import sys

LIBRARIES = ("lib/plugin/libmindspore_ascend.so.2", "lib/plugin/libmindspore_ops_ascend.so",
             "lib/plugin/ascend/libmindspore_ascend_res_manager.so", "lib/plugin/ascend/libmindspore_graph_ir.so",
             "lib/plugin/ascend/libd_collective.so", "lib/plugin/ascend/libhccl_plugin.so",
             "lib/plugin/ascend/ms_kernels_symmetric_memory/shmem/shmem/lib/libshmem.so")
OURS = re.compile(r"_ZN?K?N?K?2ge|_ZNK?2ge|_ZN3atb|acl(?!nn|dvpp|vdec)|Hccl|rt[A-Z]|hal[A-Z]")
# By which the graph engine's operators name themselves, inputs and outputs while the library is loaded: nobody asks.
NAMING = re.compile(r"_ZN2ge(8Operator\d+(?!AttrRegister)\w*Register|23OperatorCreatorRegisterC|22InferShapeFuncRegisterC)")


def symbols(options: list[str], files: list[str]) -> set[str]:
    listing = subprocess.run(["nm", *options, *files], check=True, capture_output=True, text=True).stdout
    return {line.split()[-1].split("@")[0] for line in listing.splitlines() if line and not line.endswith(":")}


def aclnn_names(files: list[str]) -> set[str]:
    """Names of aclnn operators in the text of binaries: they are looked up at run time."""
    names = set()
    for file in files:
        with open(file, "rb") as f:
            names.update(name.decode() for name in re.findall(rb"(?<![A-Za-z0-9_])aclnn[A-Z][A-Za-z0-9]+(?=\0)", f.read()))
    return {name.removesuffix("GetWorkspaceSize") for name in names} - {"aclnnInit", "aclnnFinalize"}


def looked_up(wheel: str) -> set[str]:
    """Functions of ACL and HCCL that the wheel looks up at run time, from its headers."""
    plugin = f"{wheel}/include/mindspore/ccsrc/plugin/ascend/res_manager"
    headers = glob.glob(f"{plugin}/symbol_interface/*.h") + glob.glob(f"{plugin}/hccl_adapter/plugin/*.h")
    text = "".join(open(header).read() for header in headers)
    return set(re.findall(r"ORIGIN_METHOD\w*\(\s*(\w+)", text))


def main() -> None:
    wheel, objects = sys.argv[1], sys.argv[2:]
    libraries = [f"{wheel}/{name}" for name in LIBRARIES]
    defined = symbols(["--defined-only"], objects)
    undefined = symbols(["-D", "--undefined-only"], libraries)
    in_wheel = symbols(["-D", "--defined-only"], libraries)
    print("typedef __INTPTR_TYPE__ word;\nint sim_missing_operator(const char *, const word *, int);\n"
          "void sim_missing_function(const char *);")
    asked = {name for name in undefined if OURS.match(name)} | looked_up(wheel)
    for name in sorted(asked - defined - in_wheel):
        body = "" if NAMING.match(name) else f'sim_missing_function("{name}");'
        print(f"void {name}(void) {{ {body} }}")
    words = ", ".join(f"word a{i}" for i in range(24))
    array = ", ".join(f"a{i}" for i in range(24))
    for name in sorted(aclnn_names(libraries)):
        if f"{name}GetWorkspaceSize" not in defined:
            print(f"int {name}GetWorkspaceSize({words}) {{ word all[] = {{{array}}}; "
                  f'return sim_missing_operator("{name}", all, 24); }}')


if __name__ == "__main__":
    main()
