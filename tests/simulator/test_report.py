"""simulator/report.py on logs written here by hand: what counts as a step, a token, a layer."""

from simulator.report import Event, read, report, text


def log(*lines):
    """Events a microsecond apart: "launch NAME", "copy to host BYTES", "copy to device BYTES", "allocate BYTES", …"""
    events = []
    for time, line in enumerate(lines):
        kind, *rest = line.split()
        if kind == "copy":
            name = "device to host" if rest[1] == "host" else "host to device"
            events.append(Event(time, kind, 0, name, int(rest[2]), ""))
        elif kind in ("allocate", "free"):
            events.append(Event(time, kind, -1, "physical", int(rest[0]), ""))
        elif kind == "error":
            events.append(Event(time, kind, -1, "", 0, " ".join(rest)))
        else:
            events.append(Event(time, kind, 0, rest[0], 0, ""))
    return events


FORWARD = ("launch aclnnRmsNorm", "launch aclnnMm", "launch aclnnFlashAttentionScore", "launch aclnnMm")
BACKWARD = ("launch aclnnFlashAttentionScoreGrad", "launch aclnnMm", "launch aclnnMm", "launch aclnnRmsNormGrad")


def step(update):
    return ("copy to device 80", *FORWARD, *FORWARD, "launch aclnnCrossEntropyLoss", *BACKWARD, *BACKWARD,
            "copy to host 4", "synchronize stream", *["launch aclnnApplyAdamWV2"] * update)


def test_steps():
    compiling = ("launch aclnnCast", "copy to device 1000000")
    found = report(log("allocate 100", *compiling, *step(3), *compiling, *step(3), "allocate 50", *step(3), "free 100",
                       *step(3), "allocate 60"))
    assert (found.unit, found.count) == ("step", 2)
    assert found.kernels == {"aclnnMm": 8, "aclnnApplyAdamWV2": 3, "aclnnRmsNorm": 2, "aclnnFlashAttentionScore": 2,
                             "aclnnFlashAttentionScoreGrad": 2, "aclnnRmsNormGrad": 2, "aclnnCrossEntropyLoss": 1}
    assert found.layer_forward == {"aclnnFlashAttentionScore": 1, "aclnnMm": 2, "aclnnRmsNorm": 1}
    assert found.layer_backward == {"aclnnFlashAttentionScoreGrad": 1, "aclnnMm": 2, "aclnnRmsNormGrad": 1}
    assert found.copies["host to device"] == (1, 80)
    assert found.copies["device to host"] == (1, 4)
    assert found.synchronisations == 1
    assert found.peak_bytes == 150
    assert found.update_milliseconds == 2 / 1000
    assert found.milliseconds == (len(step(3)) + 1) / 1000  # one of the two steps allocates or frees on the way


def test_tokens():
    layer = ("launch InternalAddRmsNorm", "launch InternalMatMul", "launch InternalPagedAttention", "launch aclnnAddmm")
    token = ("copy to device 8", "launch InternalGather", *layer, *layer, *layer, "launch aclnnArgMax", "copy to host 4")
    found = report(log("launch aclnnFlashAttentionScore", *token, *token, *token, *token, "error no more"))
    assert (found.unit, found.count) == ("token", 2)
    assert found.layer_forward == {"InternalAddRmsNorm": 1, "InternalMatMul": 1, "InternalPagedAttention": 1, "aclnnAddmm": 1}
    assert sum(found.kernels.values()) == 14
    assert found.copies["host to device"] == (1, 8)
    assert found.errors == ["no more"]
    assert "2 tokens, of each" in text(found) and "a layer forward  4:" in text(found)


def test_tokens_on_a_plain_cache():
    layer = ("launch aclnnMm", "launch ScatterUpdate", "launch ScatterUpdate", "launch InternalSoftmax")
    token = ("copy to device 8", *layer, *layer, "launch aclnnMm", "copy to host 4")
    found = report(log("launch aclnnCast", "copy to host 4", *token, *token, *token))
    assert (found.unit, found.count, found.copies["device to host"]) == ("token", 1, (1, 4))
    assert found.layer_forward == {"InternalSoftmax": 1, "aclnnMm": 1, "ScatterUpdate": 2}


def test_steps_without_fused_attention():
    forward = ("launch aclnnMm", "launch aclnnSoftmax", "launch aclnnMatmul")
    backward = ("launch aclnnSwiGluGrad", "launch aclnnMm", "launch aclnnSoftmax")
    found = report(log(*(*forward, *forward, "launch aclnnCrossEntropyLoss", *backward, *backward,
                         "launch aclnnApplyAdamWV2", "launch aclnnRmsNorm") * 3))
    assert found.unit == "step"
    assert found.layer_forward == {"aclnnMm": 1, "aclnnSoftmax": 1, "aclnnMatmul": 1}
    assert found.layer_backward == {"aclnnSwiGluGrad": 1, "aclnnMm": 1, "aclnnSoftmax": 1}


def test_a_run_without_steps_is_one_unit():
    found = report(log("launch aclnnAdd", "launch aclnnAdd"))
    assert (found.unit, found.kernels, found.layer_forward) == ("run", {"aclnnAdd": 2}, {})


def test_read(tmp_path):
    path = tmp_path / "log"
    path.write_text("12\tlaunch\t0\taclnnAdd\t0\tself float32 (2,3)\n14\tcopy\t0\tdevice to host\t8\t\n15\tlau", encoding="utf-8")
    assert read(str(path)) == [Event(12, "launch", 0, "aclnnAdd", 0, "self float32 (2,3)"),
                               Event(14, "copy", 0, "device to host", 8, "")]
