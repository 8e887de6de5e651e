"""A stand-in for a CUDA event, which is done when the test sets it or when it is waited for."""


class Event:
    """Fails the test if it is waited for although it is done."""

    def __init__(self, done=False):
        self.done = done
        self.synchronized = 0

    def query(self):
        return self.done

    def synchronize(self):
        assert not self.done
        self.synchronized += 1
        self.done = True
