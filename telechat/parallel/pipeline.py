"""The order of forward and backward passes over pipeline stages: one forward, one backward (1F1B).

Narayanan et al., "Efficient Large-Scale Language Model Training" (arXiv:2104.04473), section 2.2: a
stage runs as many forward passes ahead as stages follow it, then alternates, so that it never
keeps more micro-batches than there are stages. With one stage this is gradient accumulation.
"""

from telechat.parallel.collectives import receive, send


def bubble_fraction(stages, micro_batches):
    """The share of a step in which a stage waits: (p − 1) / (m + p − 1)."""
    return (stages - 1) / (micro_batches + stages - 1)


def run_schedule(compute, pipeline, parts, rows, hidden, loss):
    """Run all micro-batches of a step forwards and backwards.

    Args:
        compute (StageCompute): this stage's passes.
        pipeline (Group): the stages; the rank in it is the stage.
        parts (list): for each micro-batch ``(input_ids, place, segment_ids)`` as `StageCompute.forward` takes them.
        rows, hidden (int): shape of what is handed from stage to stage.
        loss (callable): ``loss(part)`` → (list of losses, gradient) in the last stage.

    Returns:
        list: the micro-batches' losses, read only now so that no pass waited for them; empty in all but the last stage.
    """
    last = pipeline.rank == pipeline.size - 1
    dtype = compute.stage.compute_dtype
    losses, gradients, sending = [], {}, []

    def forward(part):
        x = None
        if pipeline.rank > 0:
            x = receive((rows, hidden), dtype, pipeline.rank - 1, pipeline)
        input_ids, place, segment_ids = parts[part]
        y = compute.forward(part, input_ids, x, place, segment_ids=segment_ids)
        if last:
            value, gradients[part] = loss(part)
            losses.extend(value)
        else:
            sending.append((send(y, pipeline.rank + 1, pipeline), y))

    def backward(part):
        dy = gradients.pop(part) if last else receive((rows, hidden), dtype, pipeline.rank + 1, pipeline)
        dx = compute.backward(part, dy)
        if pipeline.rank > 0:
            sending.append((send(dx, pipeline.rank - 1, pipeline), dx))

    ahead = min(pipeline.size - 1 - pipeline.rank, len(parts))
    for part in range(ahead):
        forward(part)
    for part in range(ahead, len(parts)):
        forward(part)
        backward(part - ahead)
    for part in range(len(parts) - ahead, len(parts)):
        backward(part)
    # A tensor must live until it has been taken; by the end of the step all have been.
    for handle, _ in sending:
        handle.wait()
    return losses
