"""A rank of a group that calls HCCL on the simulated card, without MindSpore: run_hccl.py RANK SIZE JOB RESULT

JOB is a pickle {"identifier": …, "steps": [[call of each rank, …], …]}; a call is (name, arguments): arrays are copied to
the device, `Out` makes room there and is brought back, the rest goes as int. RESULT is a pickle of a list: for each step
the arrays of its `Out`s, or the text of its refusal.
"""

import ctypes
import dataclasses
import pickle
import sys

import numpy as np

from simulator.environment import BUILD

TYPES = {"int8": 0, "int16": 1, "int32": 2, "float16": 3, "float32": 4, "int64": 5, "uint8": 7, "float64": 10,
         "bfloat16": 11}  # HcclDataType; bfloat16 arrays travel as uint16


@dataclasses.dataclass
class Out:
    """An array of zeros on the device, brought back after the call."""

    shape: tuple
    dtype: str


@dataclasses.dataclass
class Counts:
    """uint64 numbers in the host's memory."""

    values: list


@dataclasses.dataclass
class Items:
    """HcclSendRecvItem for each (0 to send or 1 to receive, float32 array or `Out`, peer)."""

    values: list


class Item(ctypes.Structure):
    """HcclSendRecvItem."""

    _fields_ = [("kind", ctypes.c_int32), ("data", ctypes.c_void_p), ("count", ctypes.c_uint64),
                ("type", ctypes.c_int32), ("peer", ctypes.c_uint32)]


class Card:
    """The library in this process, with a stream and a communicator."""

    def __init__(self, rank, size, identifier):
        self.library = ctypes.CDLL(str(BUILD / "cann" / "lib64" / "libascendcl.so"))
        self.library.aclGetRecentErrMsg.restype = ctypes.c_char_p
        self.stream, self.group = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self.library.aclInit(None))
        self.check(self.library.aclrtSetDevice(0))
        self.check(self.library.aclrtCreateStream(ctypes.byref(self.stream)))
        self.check(self.library.HcclCommInitRootInfo(size, identifier.encode().ljust(4108, b"\0"), rank,
                                                     ctypes.byref(self.group)))

    def check(self, status):
        if status:
            raise RuntimeError((self.library.aclGetRecentErrMsg() or b"").decode())

    def device(self, array):
        address, size = ctypes.c_void_p(), ctypes.c_size_t(max(array.nbytes, 1))
        self.check(self.library.aclrtMalloc(ctypes.byref(address), size, 0))
        if array.nbytes:
            self.check(self.library.aclrtMemcpy(address, size, ctypes.c_void_p(array.ctypes.data), size, 1))
        return address

    def memory(self, argument, brought_back):
        """The device address of an array or `Out`, and how many elements are there."""
        if isinstance(argument, np.ndarray):
            return self.device(argument), argument.size
        array = np.zeros(argument.shape, argument.dtype.replace("bfloat16", "uint16"))
        brought_back.append((self.device(array), array))
        return brought_back[-1][0], array.size

    def call(self, name, arguments):
        given, brought_back = [], []
        for argument in arguments:
            if isinstance(argument, (Out, np.ndarray)):
                given.append(self.memory(argument, brought_back)[0])
            elif isinstance(argument, Items):
                items = (Item * len(argument.values))()
                for item, (kind, array, peer) in zip(items, argument.values):
                    address, count = self.memory(array, brought_back)
                    item.kind, item.data, item.count, item.type, item.peer = kind, address.value, count, 4, peer
                given += [items, ctypes.c_uint32(len(items))]
            elif isinstance(argument, Counts):
                given.append((ctypes.c_uint64 * len(argument.values))(*argument.values))
            else:
                given.append(ctypes.c_uint64(argument))
        self.check(getattr(self.library, name)(*given, self.group, self.stream))
        self.check(self.library.aclrtSynchronizeStream(self.stream))
        for address, array in brought_back:
            size = ctypes.c_size_t(array.nbytes)
            self.check(self.library.aclrtMemcpy(ctypes.c_void_p(array.ctypes.data), size, address, size, 2))
        return [array for _, array in brought_back]


def main(rank, size, job, result):
    with open(job, "rb") as file:
        work = pickle.load(file)
    card, answers = Card(rank, size, work["identifier"]), []
    for step in work["steps"]:
        try:
            answers.append(card.call(*step[rank]) if step[rank] else None)
        except RuntimeError as error:
            answers.append(str(error))
    with open(result, "wb") as file:
        pickle.dump(answers, file)


if __name__ == "__main__":
    from tests.simulator import run_hccl  # as a script this is another module than the one that was pickled

    run_hccl.main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
