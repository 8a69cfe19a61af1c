"""How far float32's rounding alone carries a weight in training: what two right runs may differ by.

Adam divides a gradient by the root of its mean square. Where that root is no larger than the rounding of the
gradient, as in a few weights of a hundred thousand, a weight moves by a fraction of the learning rate on
rounding alone: torch's own float32 then ends as far from torch's float64 as our meshes do from each other.
"""

import numpy as np
import torch

from telechat.checkpoint.layout import official_parameters
from telechat.nn.dropout import ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, Place, dropout_mask
from telechat.training.schedule import learning_rate
from tests.torch_reference import IGNORED, TorchTeleChat, torch_adamw


class TorchRun:
    """Training of `TorchTeleChat` in one dtype, step by step; arrays under canonical names.

    Args:
        config (TeleChatConfig): the model.
        weights (dict): canonical name → float32 array, where it starts.
        train (TrainConfig): the recipe.
        dtype: torch's.
    """

    def __init__(self, config, weights, train, dtype):
        self.config, self.train, self.dtype = config, train, dtype
        self.layout = official_parameters(config)
        # contiguous: where a published tensor is a transposed view, torch would keep it one.
        self.tensors = {stored.name: torch.tensor(np.ascontiguousarray(
            stored.join(*(weights[name] for name in stored.parameters)))).to(dtype).requires_grad_()
            for stored in self.layout}
        self.model = TorchTeleChat(config.to_dict(), self.tensors)
        self.optimizer = torch_adamw(self.tensors, train.weight_decay)
        self.steps = 0

    def step(self, ids, labels):
        """One step on int (B, S) each; returns the clipped gradients."""
        logits = self.model(torch.tensor(ids[:, :-1]).long(), lambda layer: self._drops(layer, ids[:, :-1].shape))
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]),
                                                 torch.tensor(labels[:, 1:]).long().reshape(-1), ignore_index=IGNORED)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.tensors.values()), self.train.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.train, self.steps)
        self.optimizer.step()
        self.steps += 1
        return self.canonical(lambda tensor: tensor.grad)

    def weights(self):
        return self.canonical(torch.Tensor.detach)

    def roots(self):
        """What Adam divides by: √v̂ + ε."""
        correction = 1 - self.train.betas[1] ** self.steps
        return self.canonical(
            lambda tensor: (self.optimizer.state[tensor]["exp_avg_sq"] / correction).sqrt() + self.train.eps)

    def canonical(self, get):
        """Canonical name → array of ``get(tensor)``, a copy."""
        found, taken = {}, {stored.name: get(self.tensors[stored.name]).numpy() for stored in self.layout}
        for stored in self.layout:
            if stored.partners:
                parts = (stored.combine(*(taken[name] for name in stored.partners)),)
            else:
                parts = stored.split(taken[stored.name])
            found.update((name, np.array(part)) for name, part in zip(stored.parameters, parts))
        return found

    def _drops(self, layer, shape):
        """Masks of the library, which test_trainer.py tests: attention's and those of the two outputs."""
        (batch, length), config = shape, self.config
        place = Place(self.train.seed, self.steps, range(batch), layer)

        def mask(size, rate, streams):
            return None if rate == 0 else torch.tensor(dropout_mask(*size, rate, place, streams)).to(self.dtype)

        outputs = [mask((length, config.hidden_size), config.hidden_dropout, [stream])
                   for stream in (ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT)]
        return (mask((length, length), config.attention_dropout, range(config.n_head)),
                *(None if output is None else output.reshape(batch * length, -1) for output in outputs))


def rounding_reach(config, weights, batches, train):
    """Train in torch's float64 and in its float32 side by side, and follow their difference.

    The noise of a step is the distance of the two runs' gradients, root mean square over a row (a vector is one
    row). To first order it moves a weight by learning rate · noise / (√v̂ + ε), with v̂ of the float64 run; the
    reach of a weight is the sum of that over the steps.

    Args:
        config, weights, train: as `TorchRun` takes them.
        batches (list): (input_ids, labels) of each step.

    Returns:
        (dict, dict): canonical name → reach, and → the float64 run's weights.
    """
    exact, rounded = (TorchRun(config, weights, train, dtype) for dtype in (torch.float64, torch.float32))
    reach = {name: 0.0 for name in weights}
    for step, batch in enumerate(batches):
        rate = learning_rate(train, step)
        gradients, others = exact.step(*batch), rounded.step(*batch)
        for name, root in exact.roots().items():
            noise = np.sqrt(np.mean((others[name] - gradients[name]) ** 2, axis=-1, keepdims=True))
            # A gradient of exactly 0 is that of a token that no batch holds: nothing was rounded.
            reach[name] = reach[name] + np.where(gradients[name] == 0, 0, rate * noise / root)
    return reach, exact.weights()
