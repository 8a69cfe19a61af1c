"""Loss scaling for float16, whose smallest gradients would vanish and whose largest overflow.

Micikevicius et al., "Mixed Precision Training" (arXiv:1710.03740): the loss is multiplied by a scale,
the gradients divided by it before they are used. The scale grows after a while without an overflow
and backs off at each one.
"""

LARGEST = 2.0 ** 24
FACTOR = 2.0


class LossScale:
    """The scale of a run and how long it has been good.

    Args:
        initial (float): the first scale.
        window (int): steps in a row without an overflow after which it doubles.
    """

    def __init__(self, initial=2.0 ** 16, window=1000):
        self.value = initial
        self.window = window
        self.good_steps = 0

    def back_off(self):
        """Halve after an overflow; False where it is at 1 already, so that the scale is not to blame."""
        self.good_steps = 0
        if self.value <= 1:
            return False
        self.value = max(self.value / FACTOR, 1.0)
        return True

    def succeed(self):
        """Count a step without overflow; the scale doubles after ``window`` of them."""
        self.good_steps += 1
        if self.good_steps >= self.window:
            self.value = min(self.value * FACTOR, LARGEST)
            self.good_steps = 0
