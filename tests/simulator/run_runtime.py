"""One scenario of the runtime on the simulated card, by ACL's own functions, without MindSpore: run_runtime.py SCENARIO

Prints what a test asserts on, as JSON.
"""

import ctypes
import json
import sys
import threading

from simulator.environment import BUILD

FLOAT32, TO_DEVICE, TO_HOST, COUNT = 0, 1, 2, 8
SIZE = 4 * COUNT
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
library = ctypes.CDLL(str(BUILD / "cann" / "lib64" / "libascendcl.so"))
library.aclGetRecentErrMsg.restype = ctypes.c_char_p
library.aclCreateTensor.restype = library.aclCreateScalar.restype = ctypes.c_void_p


class Refused(Exception):
    """A call's status was not 0."""


def check(status):
    if status:
        raise Refused((library.aclGetRecentErrMsg() or b"").decode())


def pointer(function, *arguments):
    result = ctypes.c_void_p()
    check(getattr(library, function)(ctypes.byref(result), *arguments))
    return result


def allocate(size=SIZE):
    return pointer("aclrtMalloc", ctypes.c_size_t(size), 0)


def host(value=0.0):
    return (ctypes.c_float * COUNT)(*[value] * COUNT)


def to_device(numbers, address, stream=None):
    copy = ctypes.cast(address, ctypes.c_void_p), ctypes.c_size_t(SIZE), numbers, ctypes.c_size_t(SIZE), TO_DEVICE
    check(library.aclrtMemcpyAsync(*copy, stream) if stream else library.aclrtMemcpy(*copy))


def to_host(address, numbers, stream=None):
    copy = numbers, ctypes.c_size_t(SIZE), address, ctypes.c_size_t(SIZE), TO_HOST
    check(library.aclrtMemcpyAsync(*copy, stream) if stream else library.aclrtMemcpy(*copy))
    return list(numbers)


def tensor(address):
    shape, stride = (ctypes.c_int64 * 1)(COUNT), (ctypes.c_int64 * 1)(1)
    return ctypes.c_void_p(library.aclCreateTensor(shape, ctypes.c_uint64(1), FLOAT32, stride, ctypes.c_int64(0), 2, shape,
                                                   ctypes.c_uint64(1), address))


def add(x, y, out, stream):
    """out = x + y, queued."""
    one, size, executor = ctypes.c_float(1), ctypes.c_uint64(), ctypes.c_void_p()
    alpha = ctypes.c_void_p(library.aclCreateScalar(ctypes.byref(one), FLOAT32))
    check(library.aclnnAddGetWorkspaceSize(tensor(x), tensor(y), alpha, tensor(out), ctypes.byref(size),
                                           ctypes.byref(executor)))
    check(library.aclnnAdd(None, ctypes.c_uint64(0), executor, stream))


class Gate:
    """Holds a stream until it is opened."""

    def __init__(self, stream):
        self.event = threading.Event()
        self.callback = CALLBACK(lambda _: self.event.wait() and None)
        check(library.aclrtLaunchCallback(self.callback, None, 1, stream))

    def open(self):
        self.event.set()


def refusal(function):
    try:
        function()
    except Refused as error:
        return str(error)
    return None


def host_pointer(stream):
    x, numbers = allocate(), host(1)
    to_device(numbers, x)
    add(x, ctypes.cast(numbers, ctypes.c_void_p), x, stream)
    return refusal(lambda: check(library.aclrtSynchronizeStream(stream)))


def freed(stream):
    x, y = allocate(), allocate()
    check(library.aclrtFree(y))
    add(x, y, x, stream)
    other = pointer("aclrtCreateStream")
    return [refusal(lambda: check(library.aclrtSynchronizeStream(each))) for each in (stream, other)]


def host_reads_device(stream):
    ctypes.string_at(allocate(), 4)


def new_memory(stream):
    return [str(x) for x in to_host(allocate(), host(1))]


def late_copy(stream):
    x, there = allocate(), host(0)
    to_device(host(5), x)
    gate = Gate(stream)
    before = to_host(x, there, stream)
    gate.open()
    check(library.aclrtSynchronizeStream(stream))
    return [before, list(there)]


def two_streams(stream):
    """What a second stream reads of the first's result: without an event between them, and with one."""
    other, results = pointer("aclrtCreateStream"), []
    for event in (None, pointer("aclrtCreateEvent")):
        x = allocate()
        to_device(host(1), x)
        gate, there = Gate(stream), host(0)
        add(x, x, x, stream)
        if event:
            check(library.aclrtRecordEvent(event, stream))
            check(library.aclrtStreamWaitEvent(other, event))
            gate.open()
        to_host(x, there, other)
        check(library.aclrtSynchronizeStream(other))
        gate.open()
        check(library.aclrtSynchronizeStream(stream))
        results.append(list(there))
    return results


def delayed(stream):
    """How many of 40 results of one stream a second does not see yet, with no event between them and with one."""
    other, missed = pointer("aclrtCreateStream"), []
    for event in (None, pointer("aclrtCreateEvent")):
        x, y, late = allocate(), allocate(), 0
        to_device(host(1), y)
        to_device(host(0), x)
        for round in range(40):
            add(x, y, x, stream)
            if event:
                check(library.aclrtRecordEvent(event, stream))
                check(library.aclrtStreamWaitEvent(other, event))
            there = host(0)
            to_host(x, there, other)
            check(library.aclrtSynchronizeStream(other))
            late += there[0] != round + 1
            check(library.aclrtSynchronizeStream(stream))
        missed.append(late)
    return missed


def memory(stream):
    """Whether 600, again 600 and, after the first is freed, 300 MB can be had; and what it says if not."""
    def three():
        first = allocate(600 << 20)
        results.append(refusal(lambda: allocate(600 << 20)))
        check(library.aclrtFree(first))
        results.append(refusal(lambda: allocate(300 << 20)))
    results = []
    results.insert(0, refusal(three))
    return results


if __name__ == "__main__":
    check(library.aclInit(None))
    check(library.aclrtSetDevice(0))
    print(json.dumps(globals()[sys.argv[1]](pointer("aclrtCreateStream"))))
