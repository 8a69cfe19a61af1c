"""SIGINT and SIGTERM, noted instead of breaking off in the middle of a step."""

import signal


class StopSignal:
    """Notes SIGINT and SIGTERM instead of breaking off in the middle of a step."""

    def __init__(self):
        self.received = False
        self._previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        print("finishing this step, then saving (press Ctrl-C again to break off)", flush=True)

    def restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
