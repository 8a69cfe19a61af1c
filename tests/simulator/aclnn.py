"""Calls operators of the simulated card as MindSpore does, by their C prototypes, without MindSpore.

The card lives in a process of its own: MindSpore, were it imported beside it, would take it for its device.
"""

import atexit
import ctypes
import functools
import pickle
import subprocess
import sys
from dataclasses import dataclass

import torch

from simulator.environment import BUILD

DTYPES = {torch.float32: 0, torch.float16: 1, torch.int8: 2, torch.int32: 3, torch.uint8: 4, torch.int64: 9,
          torch.float64: 11, torch.bool: 12, torch.bfloat16: 27}  # aclDataType


class Refused(Exception):
    """The operator, or the stream it ran in, gave a status that is not 0; the text is aclGetRecentErrMsg's."""


@dataclass
class Out:
    """A tensor that the operator writes; `call` gives back what is in it then."""

    tensor: torch.Tensor


@dataclass
class Constant:
    """An input whose values are known on the host, of an old operator."""

    tensor: torch.Tensor


@dataclass
class Scalar:
    """An aclScalar."""

    value: float
    dtype: torch.dtype = torch.float32


@dataclass
class Int8:
    """A number where the prototype has int8_t."""

    value: int


@dataclass
class Float:
    """A number where the prototype has float (a Python float is a double)."""

    value: float


@dataclass
class Int4:
    """A tensor of int4 (rows, columns), numbers from -8 to 7, two in a byte; ``turned``: given as its transpose."""

    numbers: torch.Tensor
    turned: bool = False

    def bytes(self):
        bits = self.numbers.flatten().to(torch.uint8) & 15
        return bits[::2] | bits[1::2] << 4


def empty(*shape, dtype=torch.float32):
    """An `Out` of this shape."""
    return Out(torch.zeros(shape, dtype=dtype))


def call(name, *arguments):
    """Run an operator and give the contents of its `Out` tensors: the one tensor, or a list.

    Arguments in the order of the prototype, without workspace and executor: tensors (strides are kept), `Out`, `Scalar`,
    lists of tensors or of whole numbers, None, int (int64_t), float (double), bool, str, `Int8`, `Float`.
    Raises Refused.
    """
    return _ask("call", name, arguments)


def call_old(name, inputs, outputs, **attributes):
    """Run an operator of the old road (aclopCompileAndExecuteV2).

    Args:
        inputs: tensors, `Constant`, or `Out` for a variable that is written in place.
        outputs: `Out`; one that is an input too shares its memory.
        attributes: bool or int.

    Returns as `call` the outputs' contents. Raises Refused.
    """
    return _ask("call_old", name, inputs, outputs, attributes)


def _ask(*request):
    card = _card()
    pickle.dump(request, card.stdin)
    card.stdin.flush()
    refusal, results = pickle.load(card.stdout)
    if refusal is not None:
        raise Refused(refusal)
    return results[0] if len(results) == 1 else results


@functools.cache
def _card():
    process = subprocess.Popen([sys.executable, "-m", "tests.simulator.aclnn"], cwd=BUILD.parents[1],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(process.communicate)  # the end of its input ends it
    return process


class Card:
    """The library in this process."""

    def __init__(self):
        self.library = library = ctypes.CDLL(str(BUILD / "cann" / "lib64" / "libascendcl.so"))
        for name in ("Tensor", "Scalar", "IntArray", "TensorList", "TensorDesc", "DataBuffer"):
            getattr(library, f"aclCreate{name}").restype = ctypes.c_void_p
        library.aclopCreateAttr.restype = ctypes.c_void_p
        library.aclGetRecentErrMsg.restype = ctypes.c_char_p
        self.stream = ctypes.c_void_p()
        self.check(library.aclInit(None))
        self.check(library.aclrtSetDevice(0))
        self.check(library.aclrtCreateStream(ctypes.byref(self.stream)))

    def check(self, status):
        if status:
            raise Refused((self.library.aclGetRecentErrMsg() or b"").decode())

    def copy(self, to, source, size, kind):
        self.check(self.library.aclrtMemcpy(ctypes.c_void_p(to), ctypes.c_size_t(size), ctypes.c_void_p(source),
                                            ctypes.c_size_t(size), kind))

    def memory(self, tensor, memory):
        """A device address with a copy of the tensor's memory, and a function that gives the contents back."""
        size = tensor.untyped_storage().nbytes()
        address = ctypes.c_void_p()
        self.check(self.library.aclrtMalloc(ctypes.byref(address), ctypes.c_size_t(max(size, 1)), 0))
        memory.append(address)
        if size:
            self.copy(address.value, tensor.untyped_storage().data_ptr(), size, 1)

        def contents():
            if size:
                self.copy(tensor.untyped_storage().data_ptr(), address.value, size, 2)
            return tensor.clone()

        return address, contents

    def tensor(self, tensor, memory):
        """An aclTensor on a copy of the tensor's memory; (its handle, how its contents are read back)."""
        address, contents = self.memory(tensor, memory)
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        return self.library.aclCreateTensor(
            sizes(tensor.shape), ctypes.c_uint64(tensor.dim()), DTYPES[tensor.dtype], sizes(tensor.stride()),
            ctypes.c_int64(tensor.storage_offset()), 2, sizes([elements]), ctypes.c_uint64(1), address), contents

    def int4(self, value, memory):
        """An aclTensor of an `Int4`."""
        packed = value.bytes().contiguous()
        shape, strides = list(value.numbers.shape), [value.numbers.shape[1], 1]
        if value.turned:
            shape, strides = shape[::-1], strides[::-1]
        address, _ = self.memory(packed, memory)
        return self.library.aclCreateTensor(sizes(shape), ctypes.c_uint64(2), 29, sizes(strides), ctypes.c_int64(0), 2,
                                            sizes([value.numbers.numel()]), ctypes.c_uint64(1), address)

    def argument(self, value, memory, results):
        library = self.library
        if isinstance(value, Int4):
            return ctypes.c_void_p(self.int4(value, memory))
        if isinstance(value, (torch.Tensor, Out)):
            handle, contents = self.tensor(value.tensor if isinstance(value, Out) else value, memory)
            if isinstance(value, Out):
                results.append(contents)
            return ctypes.c_void_p(handle)
        if isinstance(value, Scalar):
            number = torch.tensor([value.value], dtype=value.dtype)
            return ctypes.c_void_p(library.aclCreateScalar(ctypes.c_void_p(number.data_ptr()), DTYPES[value.dtype]))
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], (torch.Tensor, Out)):
            handles = (ctypes.c_void_p * len(value))(*[self.argument(each, memory, results) for each in value])
            return ctypes.c_void_p(library.aclCreateTensorList(handles, ctypes.c_uint64(len(value))))
        if isinstance(value, (list, tuple)):
            return ctypes.c_void_p(library.aclCreateIntArray(sizes(value), ctypes.c_uint64(len(value))))
        for kind, convert in ((bool, ctypes.c_bool), (int, ctypes.c_int64), (float, ctypes.c_double)):
            if isinstance(value, kind):
                return convert(value)
        if isinstance(value, Int8):
            return ctypes.c_int8(value.value)
        if isinstance(value, Float):
            return ctypes.c_float(value.value)
        return ctypes.c_void_p(None) if value is None else ctypes.c_char_p(value.encode())

    def call(self, name, arguments):
        memory, results = [], []
        try:
            given = [self.argument(value, memory, results) for value in arguments]
            size, executor = ctypes.c_uint64(), ctypes.c_void_p()
            self.check(getattr(self.library, f"{name}GetWorkspaceSize")(*given, ctypes.byref(size), ctypes.byref(executor)))
            self.check(getattr(self.library, name)(None, ctypes.c_uint64(0), executor, self.stream))
            self.check(self.library.aclrtSynchronizeStream(self.stream))
            return [contents() for contents in results]
        finally:
            for address in memory:
                self.library.aclrtFree(address)


    def call_old(self, name, inputs, outputs, attributes):
        memory, known = [], {}
        library = self.library

        def described(value):
            tensor = value if isinstance(value, torch.Tensor) else value.tensor
            description = ctypes.c_void_p(library.aclCreateTensorDesc(DTYPES[tensor.dtype], tensor.dim(),
                                                                      sizes(tensor.shape), 2))
            if isinstance(value, Constant):
                size = tensor.untyped_storage().nbytes()
                library.aclSetTensorConst(description, ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(size))
            if id(value) not in known:
                known[id(value)] = self.memory(tensor, memory)
            return description, ctypes.c_void_p(library.aclCreateDataBuffer(known[id(value)][0], ctypes.c_size_t(
                tensor.untyped_storage().nbytes())))

        try:
            lists = []
            for values in (inputs, outputs):
                descriptions, buffers = zip(*map(described, values))
                pointers = ctypes.c_void_p * len(values)
                lists += [len(values), pointers(*descriptions), pointers(*buffers)]
            attribute = ctypes.c_void_p(library.aclopCreateAttr())
            for key, value in attributes.items():
                if isinstance(value, bool):
                    library.aclopSetAttrBool(attribute, key.encode(), ctypes.c_uint8(value))
                else:
                    library.aclopSetAttrInt(attribute, key.encode(), ctypes.c_int64(value))
            self.check(library.aclopCompileAndExecuteV2(name.encode(), *lists, attribute, 0, 0, None, self.stream))
            self.check(library.aclrtSynchronizeStream(self.stream))
            return [known[id(value)][1]() for value in outputs]
        finally:
            for address in memory:
                library.aclrtFree(address)


def sizes(values):
    """An array of int64_t, never of none."""
    return (ctypes.c_int64 * max(1, len(values)))(*values)


def serve():
    """Answer calls from standard input until it ends. After a failure the card is reset."""
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr
    card = Card()
    while True:
        try:
            method, *arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = None, getattr(card, method)(*arguments)
        except Refused as error:
            answer = str(error), []
            card.library.aclrtResetDeviceForce(0)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    # As a script this is another module than the one whose classes were pickled.
    from tests.simulator import aclnn

    aclnn.serve()
