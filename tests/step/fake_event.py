"""The end of a copy that is made when the test says so, or when it is waited for."""


class Event:
    """Fails the test if it is waited for though it is done."""

    def __init__(self, done=False):
        self.done = done
        self.synchronized = 0

    def query(self):
        return self.done

    def synchronize(self):
        assert not self.done
        self.synchronized += 1
        self.done = True
