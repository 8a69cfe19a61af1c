"""How long a run still takes: its steps, and the evaluations, answers and checkpoints between them."""

import statistics

RECENT = 20  # steps that speak for those to come
FORWARD_SHARE = 1 / 3  # of a step's time: what a batch of an evaluation takes, until one has been measured


class TimeLeft:
    """Told what everything took, it says how long the rest takes.

    What has not happened yet counts as nothing, but for evaluations, which are guessed from the steps.

    Args:
        config (RunConfig): total_steps, save_steps, eval_steps.
        evaluation_batches (int): batches of one evaluation; 0: there are none.
        first_step (int): where the run resumes.
    """

    def __init__(self, config, evaluation_batches=0, first_step=0):
        self._total, self._saves, self._evaluations = config.train.total_steps, config.save_steps, config.eval_steps
        self._evaluation_batches = evaluation_batches
        self._first = first_step + 1
        self._took = {"step": [], "evaluation": [], "answers": [], "save": []}

    def took(self, what, seconds, number=None):
        """Note what a "step" (its ``number``, 1 first), an "evaluation", "answers" or a "save" took."""
        times = self._took[what]
        if what == "step" and number == self._first + 1:
            times.clear()  # the first one compiles
        times.append(seconds)
        del times[:-RECENT]

    def after(self, step):
        """Seconds that are left after so many steps, what belongs to that step itself not counted."""
        saves = self._times(step, self._saves) + (step < self._total and not self._last_is_due(self._saves))
        evaluations = 0
        if self._evaluation_batches:
            evaluations = self._times(step, self._evaluations) if self._evaluations else saves
        one_step = self._typical("step")
        evaluation = self._typical("evaluation") or FORWARD_SHARE * one_step * self._evaluation_batches
        return ((self._total - step) * one_step + evaluations * evaluation
                + saves * (self._typical("answers") + self._typical("save")))

    def _times(self, step, interval):
        """How often something that happens every ``interval`` steps is still to come."""
        return self._total // interval - step // interval if interval else 0

    def _last_is_due(self, interval):
        return bool(interval) and self._total % interval == 0

    def _typical(self, what):
        return statistics.median(self._took[what]) if self._took[what] else 0.0
